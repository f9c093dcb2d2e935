"""vector_quantize_pytorch's public names over vqfast's search; `import vqfast.compat.vector_quantize_pytorch as vector_quantize_pytorch`."""

from vqfast.compat.vector_quantize_pytorch.random_projection_quantizer import RandomProjectionQuantizer
from vqfast.compat.vector_quantize_pytorch.residual_sim_vq import ResidualSimVQ
from vqfast.compat.vector_quantize_pytorch.residual_vq import GroupedResidualVQ, ResidualVQ
from vqfast.compat.vector_quantize_pytorch.sim_vq import SimVQ
from vqfast.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize

__all__ = [
    "GroupedResidualVQ",
    "RandomProjectionQuantizer",
    "ResidualSimVQ",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
]
