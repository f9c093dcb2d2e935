"""Other ways to the same result, for comparison: plain PyTorch, and libraries where they are installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

import vqfast
from vqfast.nn import ResidualVectorQuantizer, VectorQuantizerEMA

DECAY, COMMITMENT = 0.99, 0.25
CDIST, EXPANDED, COMPILED = "cdist + argmin", "expanded formula", "expanded, compiled"
FAISS, LAYERS = "FAISS flat", "vector-quantize-pytorch"


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def expanded(x: Tensor, codebook: Tensor) -> Tensor:
    """argmin of |c|^2 - 2 x.c, as many quantizers write it; nearly equal distances may come out in the wrong order."""
    return torch.addmm(codebook.square().sum(-1), x, codebook.t(), alpha=-2).argmin(-1)


def searches(x: Tensor, codebook: Tensor, *, compiled: bool = True) -> dict[str, Callable[[], Tensor]]:
    """Name -> call that gives the indices [N] of x [N, D] in codebook [K, D]; "vqfast" comes first.

    FAISS is handed a finished index; everybody else starts from the bare codebook.
    """
    found: dict[str, Callable[[], Tensor]] = {
        "vqfast": lambda: vqfast.nearest(x, codebook).indices,
        CDIST: lambda: torch.cdist(x, codebook).argmin(-1),
        EXPANDED: lambda: expanded(x, codebook),
    }
    if compiled and (x.is_cuda or shutil.which(os.environ.get("CXX", "g++"))):
        torch.compiler.reset()  # dynamo gives up compiling a function for its ninth shape
        program = torch.compile(expanded, dynamic=False)
        found[COMPILED] = lambda: program(x, codebook)
    if installed("faiss") and x.device.type == "cpu":
        found[FAISS] = _faiss(x, codebook)
    return found


def _faiss(x: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    rows = x.numpy()
    return lambda: torch.from_numpy(index.search(rows, 1)[1][:, 0])


def layers(codebook: Tensor) -> dict[str, nn.Module]:
    """Name -> quantizer layer with a moving-average codebook that starts at `codebook` [K, D]; or [Q, K, D], and then
    residual with Q levels. Same decay and commitment weight, straight-through gradient, no revival.
    """
    *levels, size, dim = codebook.shape
    residual = {"num_quantizers": levels[0]} if levels else {}
    make = ResidualVectorQuantizer if residual else VectorQuantizerEMA
    ours = make(dim, size, decay=DECAY, commitment_weight=COMMITMENT, **residual)
    ours.set_codebook_(codebook)
    found: dict[str, nn.Module] = {"vqfast": ours}
    if installed("vector_quantize_pytorch"):
        import vector_quantize_pytorch as other

        make = other.ResidualVQ if residual else other.VectorQuantize
        options = {"decay": DECAY, "commitment_weight": COMMITMENT, "rotation_trick": False}
        theirs = make(dim=dim, codebook_size=size, **options, **residual)
        parts = theirs.layers if residual else [theirs]
        for part, codes in zip(parts, codebook.reshape(-1, size, dim), strict=True):
            part._codebook.embed.data.copy_(codes[None])
            part._codebook.embed_avg.data.copy_(codes[None])
        found[LAYERS] = theirs
    return {name: layer.to(codebook.device).train() for name, layer in found.items()}


def indices_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The codes that a layer chooses for x [N, D], in evaluation."""
    was = layer.training
    layer.eval()
    with torch.no_grad():
        out = layer(x[None])
    layer.train(was)
    return (out.indices if hasattr(out, "indices") else out[1])[0]


def training_step(layer: nn.Module, x: Tensor) -> None:
    """Forward, backward and codebook update."""
    rows = x[None].detach().requires_grad_()
    out = layer(rows)
    quantized, loss = (out.quantized, out.loss) if hasattr(out, "loss") else (out[0], out[2])
    (quantized.sum() + loss.sum()).backward()
