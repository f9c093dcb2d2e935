"""vector_quantize_pytorch's public names over vqfast's search; `import vqfast.compat.vector_quantize_pytorch as vector_quantize_pytorch`."""

from vqfast.compat.vector_quantize_pytorch.residual_vq import GroupedResidualVQ, ResidualVQ
from vqfast.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize

__all__ = ["GroupedResidualVQ", "ResidualVQ", "VectorQuantize"]
