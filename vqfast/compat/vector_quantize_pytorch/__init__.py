"""vector_quantize_pytorch's public names over vqfast's search.

`import vqfast.compat.vector_quantize_pytorch as vector_quantize_pytorch` is all that a project changes; the modules of this
package are named as the other library's are. docs/COMPAT.md lists where results differ on purpose.
"""

from vqfast.compat.vector_quantize_pytorch.binary_mapper import BinaryMapper
from vqfast.compat.vector_quantize_pytorch.evo_lookup_free_quantization import EvoLFQ
from vqfast.compat.vector_quantize_pytorch.finite_scalar_perturbation import FSP
from vqfast.compat.vector_quantize_pytorch.finite_scalar_quantization import FSQ
from vqfast.compat.vector_quantize_pytorch.hierarchical_vq import HierarchicalVQ
from vqfast.compat.vector_quantize_pytorch.latent_quantization import LatentQuantize
from vqfast.compat.vector_quantize_pytorch.lookup_free_quantization import LFQ
from vqfast.compat.vector_quantize_pytorch.random_projection_quantizer import RandomProjectionQuantizer
from vqfast.compat.vector_quantize_pytorch.residual_fsq import GroupedResidualFSQ, ResidualFSQ
from vqfast.compat.vector_quantize_pytorch.residual_lfq import GroupedResidualLFQ, ResidualLFQ
from vqfast.compat.vector_quantize_pytorch.residual_sim_vq import ResidualSimVQ
from vqfast.compat.vector_quantize_pytorch.residual_vq import GroupedResidualVQ, ResidualVQ
from vqfast.compat.vector_quantize_pytorch.sim_vq import SimVQ
from vqfast.compat.vector_quantize_pytorch.utils import Sequential
from vqfast.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize

__all__ = [
    "BinaryMapper",
    "EvoLFQ",
    "FSP",
    "FSQ",
    "GroupedResidualFSQ",
    "GroupedResidualLFQ",
    "GroupedResidualVQ",
    "HierarchicalVQ",
    "LFQ",
    "LatentQuantize",
    "RandomProjectionQuantizer",
    "ResidualFSQ",
    "ResidualLFQ",
    "ResidualSimVQ",
    "ResidualVQ",
    "Sequential",
    "SimVQ",
    "VectorQuantize",
]
