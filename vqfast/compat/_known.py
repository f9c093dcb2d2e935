"""The quantizers that `convert` knows, by the full name of their class; none of these libraries is imported here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqfast.compat import _image_tokenizers, _lucidrains, _transformers
from vqfast.compat.dac import VectorQuantizeMethods
from vqfast.compat.encodec import EuclideanCodebookMethods, MoshiCodebookMethods
from vqfast.compat.rosinality import QuantizeMethods
from vqfast.compat.taming import VectorQuantizer2Methods


@dataclass(frozen=True)
class Seam:
    """How one class is converted.

    Attributes:
        methods: path of a submodule ("" is the module itself) -> class whose methods go in front of the submodule's own.
        call: runs the methods on a small input and returns anything that holds tensors; an input that takes gradients too.
        refuse: why a given module cannot be converted, or "".
    """

    methods: Mapping[str, type]
    call: Callable[[nn.Module], Any]
    refuse: Callable[[nn.Module], str] = lambda module: ""


# ---- calls that show whether two modules do the same -----------------------------------------------------------------------


def _spread(codes: Tensor, count: int) -> Tensor:
    """`count` rows [count, D], near codes [K, D] spread over the codebook, so that no two codes are about as near."""
    picked = torch.linspace(0, len(codes) - 1, count, device=codes.device).long()
    return codes[picked].detach() + 0.02 * torch.rand(count, codes.shape[1], device=codes.device, dtype=codes.dtype)


def _image(codes: Tensor, side: int = 4) -> Tensor:
    """[1, D, side, side]"""
    return _spread(codes, side * side).T.reshape(1, -1, side, side).requires_grad_()


def _call_on_image(module):
    image = _image(module.embedding.weight)
    return image, module(image)


def _call_rosinality(module):
    rows = _spread(module.embed.t(), 16).view(1, 4, 4, -1).requires_grad_()
    return rows, module(rows)


def _call_video(module):
    return module(_image(module.embedding.weight)[:, None])


def _call_quantize(module):
    return module.quantize(_spread(module.embed, 16))


def _call_codebook(module):
    rows = _spread(module.embed, 16).requires_grad_()
    return rows, module(rows)


def _call_moshi(module):
    return module._quantize(_spread(module.embedding, 16))


def _call_decode_latents(module):
    return module.decode_latents(_spread(module.codebook.weight, 16).T[None])


def _call_var(module):
    image = _image(module.embedding.weight, module.v_patch_nums[-1])
    scales = [module.f_to_idxBl_or_fhat(image, to_fhat=to_fhat) for to_fhat in (False, True)]
    return image, module(image), scales


def _call_lucidrains(module):
    module._codebook.initted.fill_(True)  # no k-means on a few rows
    shapes = {"accept_image_fmap": (2, module.dim, 3, 3), "accept_3d_fmap": (2, module.dim, 2, 3, 2)}
    rows = (2, 9, module.dim) if module.channel_last else (2, module.dim, 9)
    shape = next((shapes[name] for name in shapes if getattr(module, name)), rows)
    device = module._codebook.embed.device
    z = torch.rand(shape, device=device).requires_grad_()
    return z, module(z), module(torch.rand(shape, device=device))


def _call_simvq(module):
    codes = _spread(module.codebook, 16)
    z = (codes.T if module.channel_first else codes)[None].contiguous().requires_grad_()
    return z, module(z)


# ---- reasons ---------------------------------------------------------------------------------------------------------------


def _refuse_lucidrains(module) -> str:
    drawn = getattr(module._codebook.gumbel_sample, "keywords", {})
    if drawn.get("stochastic") or drawn.get("straight_through"):
        return "it draws codes from all N x K distances (stochastic_sample_codes or straight_through)"
    if module.has_codebook_diversity_loss:
        return "its codebook_diversity_loss is a function of all N x K distances"
    if module.commitment_use_cross_entropy_loss:
        return "its cross entropy commitment loss is a function of all N x K distances"
    return ""


def _refuse_llamagen(module) -> str:
    return "its entropy loss is a function of all N x K distances" if module.entropy_loss_ratio else ""


def _refuse_titok(module) -> str:
    return "clustering_vq takes the nearest row of every code, from all N x K distances" if module.clustering_vq else ""


# ---- the table -------------------------------------------------------------------------------------------------------------


def _seam(methods: type, call: Callable, refuse: Callable[[nn.Module], str] | None = None) -> Seam:
    return Seam({"": methods}, call, refuse) if refuse else Seam({"": methods}, call)


_TRANSFORMERS = "transformers.models."
_HF_CODEBOOK = _seam(_transformers.EuclideanCodebookMethods, _call_quantize)
_ENCODEC = _seam(EuclideanCodebookMethods, _call_codebook)
_VQGAN = _seam(VectorQuantizer2Methods, _call_on_image)
_IMAGE = _seam(_transformers.ImageQuantizerMethods, _call_on_image)


KNOWN: dict[str, Seam] = {
    "vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize": Seam(
        {"": _lucidrains.VectorQuantizeMethods, "_codebook": _lucidrains.CodebookMethods}, _call_lucidrains, _refuse_lucidrains
    ),
    "vector_quantize_pytorch.sim_vq.SimVQ": _seam(_lucidrains.SimVQMethods, _call_simvq),
    _TRANSFORMERS + "encodec.modeling_encodec.EncodecEuclideanCodebook": _HF_CODEBOOK,
    _TRANSFORMERS + "mimi.modeling_mimi.MimiEuclideanCodebook": _HF_CODEBOOK,
    _TRANSFORMERS + "xcodec.modeling_xcodec.XcodecEuclideanCodebook": _HF_CODEBOOK,
    _TRANSFORMERS
    + "higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer.HiggsAudioV2TokenizerEuclideanCodebook": _HF_CODEBOOK,
    _TRANSFORMERS + "dac.modeling_dac.DacVectorQuantize": _seam(_transformers.DacVectorQuantizeMethods, _call_decode_latents),
    _TRANSFORMERS + "chameleon.modeling_chameleon.ChameleonVQVAEVectorQuantizer": _IMAGE,
    _TRANSFORMERS + "janus.modeling_janus.JanusVQVAEVectorQuantizer": _IMAGE,
    _TRANSFORMERS + "emu3.modeling_emu3.Emu3VQVAEVectorQuantizer": _seam(_transformers.VideoQuantizerMethods, _call_video),
    _TRANSFORMERS + "glm_image.modeling_glm_image.GlmImageVQVAEVectorQuantizer": _seam(
        _transformers.SphericalImageQuantizerMethods, _call_on_image
    ),
    "diffusers.models.autoencoders.vae.VectorQuantizer": _VQGAN,
    "taming.modules.vqvae.quantize.VectorQuantizer2": _VQGAN,
    "encodec.quantization.core_vq.EuclideanCodebook": _ENCODEC,
    "audiocraft.quantization.core_vq.EuclideanCodebook": _ENCODEC,
    "moshi.quantization.core_vq.EuclideanCodebook": _seam(MoshiCodebookMethods, _call_moshi),
    "dac.nn.quantize.VectorQuantize": _seam(VectorQuantizeMethods, _call_decode_latents),
    "vqvae.Quantize": _seam(QuantizeMethods, _call_rosinality),
    "models.quant.VectorQuantizer2": _seam(_image_tokenizers.VARMethods, _call_var),
    "tokenizer.tokenizer_image.vq_model.VectorQuantizer": _seam(
        _image_tokenizers.LlamaGenMethods, _call_on_image, _refuse_llamagen
    ),
    "modeling.quantizer.quantizer.VectorQuantizer": _seam(_image_tokenizers.TiTokMethods, _call_on_image, _refuse_titok),
}

REFUSED: dict[str, str] = {
    "taming.modules.vqvae.quantize.VectorQuantizer": "it returns min_encodings, an N x K matrix; use VectorQuantizer2",
    "taming.modules.vqvae.quantize.GumbelQuantize": "it draws codes from N x K logits; there is no search",
}
