"""`Sequential` of vector_quantize_pytorch 1.32: modules around one quantizer."""

from __future__ import annotations

from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch._checks import require
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
from vqfast.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize

QUANTIZE_KLASSES = (
    VectorQuantize,
    ResidualVQ,
    GroupedResidualVQ,
    RandomProjectionQuantizer,
    FSQ,
    LFQ,
    SimVQ,
    ResidualSimVQ,
    ResidualLFQ,
    GroupedResidualLFQ,
    ResidualFSQ,
    GroupedResidualFSQ,
    FSP,
    LatentQuantize,
    HierarchicalVQ,
)


class Sequential(nn.Module):
    """Modules in a row, exactly one of them a quantizer; state dict `fns.{i}.*`.

    Returns (output of the last module, then what the quantizer returned beside its first result).
    """

    def __init__(self, *fns: nn.Module):
        super().__init__()
        number = sum(isinstance(fn, QUANTIZE_KLASSES) for fn in fns)
        require(number == 1, f"Sequential needs exactly one quantizer among its modules, got {number}.")
        self.fns = nn.ModuleList(fns)

    def forward(self, x: Tensor, **kwargs) -> tuple:
        """Keyword arguments go to the quantizer."""
        rest: tuple = ()
        for fn in self.fns:
            if isinstance(fn, QUANTIZE_KLASSES):
                x, *rest = fn(x, **kwargs)
            else:
                x = fn(x)
        return x, *rest
