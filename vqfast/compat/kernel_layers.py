"""Stateless layers in the sense of Hugging Face's `kernels`: a forward for a module that has the weights, and nothing else.

    kernels.register_kernel_mapping({"Emu3VQVAEVectorQuantizer": {"cpu": LocalLayerRepository(..., layer_name="VideoQuantizer")}})
"""

from __future__ import annotations

from torch import nn

from vqfast.compat import _transformers, taming


class ImageQuantizer(nn.Module):
    """forward of ChameleonVQVAEVectorQuantizer and JanusVQVAEVectorQuantizer; reads embedding and beta."""

    can_torch_compile = True
    has_backward = True
    forward = _transformers.ImageQuantizerMethods.forward


class SphericalImageQuantizer(nn.Module):
    """forward of GlmImageVQVAEVectorQuantizer; reads embedding and beta."""

    can_torch_compile = True
    has_backward = True
    forward = _transformers.SphericalImageQuantizerMethods.forward


class VideoQuantizer(nn.Module):
    """forward of Emu3VQVAEVectorQuantizer; reads embedding. Its result, indices, carries no gradient."""

    can_torch_compile = True
    has_backward = True
    forward = _transformers.VideoQuantizerMethods.forward


class VectorQuantizer2(nn.Module):
    """forward of taming-transformers' VectorQuantizer2; reads embedding, beta, legacy, remap and sane_index_shape."""

    can_torch_compile = True
    has_backward = True
    forward = taming.VectorQuantizer2Methods.forward
