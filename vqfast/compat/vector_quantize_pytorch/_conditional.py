"""Lookup in codes that differ from row to row: a function of the codebook and of what was quantized before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqfast.compat.vector_quantize_pytorch import _plain
from vqfast.compat.vector_quantize_pytorch._codebook import Codebook, Found
from vqfast.compat.vector_quantize_pytorch._gradients import l2norm
from vqfast.ops.gather import gather


class RowCodes:
    """Codes of a row as network(code, condition of that row); known row by row, so never all at once.

    Args:
        network: maps (codes [..., D], condition [..., D]), broadcast against each other, to codes [..., D].
        condition: [..., D], one per row, in the order of the rows.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], condition: Tensor):
        self.network, self.condition = network, condition.reshape(-1, condition.shape[-1])

    def chunks(self, codes: Tensor):
        """(first row, codes [n, K, D] of n rows), chunk by chunk; codes [K, D]."""
        step = max(1, _plain.CHUNK_SCORES // codes.numel())
        for start in range(0, len(self.condition), step):
            part = self.condition[start : start + step, None]
            yield start, self.network(codes.expand(len(part), *codes.shape), part.expand(-1, len(codes), -1))

    def chosen(self, codes: Tensor, indices: Tensor) -> Tensor:
        """[..., D] codes of indices [rows] or [rows, k]; differentiable."""
        condition = self.condition if indices.dim() == 1 else self.condition[:, None].expand(-1, indices.shape[1], -1)
        return self.network(gather(codes, indices), condition)


class AllCodes:
    """Codes of all rows at once, as a user's function made them: [rows, K, D]."""

    def __init__(self, codes: Tensor):
        self.all = codes

    def chunks(self, codes: Tensor):
        yield 0, self.all

    def chosen(self, codes: Tensor, indices: Tensor) -> Tensor:
        picked = indices.reshape(len(indices), -1, 1).clamp(min=0).expand(-1, -1, self.all.shape[-1])
        return self.all.gather(1, picked).reshape(*indices.shape, -1)


def lookup(
    codebook: Codebook, rows: Tensor, codes: Tensor, transform, mask: Tensor | None, *, temperature: float | None, topk: int | None
) -> Found:
    """`Codebook.lookup` among the codes that `transform` makes of them.

    rows [B, C, N, D], codes [C, K, D], mask [B, N]; transform is a RowCodes (one codebook), or a function of codes [C, K, D]
    that returns [C, B, N, K, D].
    """
    if isinstance(transform, RowCodes):
        sources = [transform]
    else:
        sources = [AllCodes(own.flatten(0, 1)) for own in transform(codes)]
    b, c, n, d = rows.shape
    flat = rows.transpose(0, 1).reshape(c, b * n, d)
    found, quantized = [], []
    for source, group, own in zip(sources, flat, codes, strict=True):
        indices = _best(source, group, own, codebook.use_cosine_sim, temperature, topk)
        if mask is not None:
            indices = indices.masked_fill(~mask.reshape(b * n, *(1,) * (indices.dim() - 1)), -1)
        out = source.chosen(own, indices)
        out = l2norm(out) if codebook.use_cosine_sim else out
        found.append(indices)
        quantized.append(torch.where((indices >= 0)[..., None], out, 0))
    indices = torch.stack(found).unflatten(1, (b, n)).transpose(0, 1)
    quantized = torch.stack(quantized).unflatten(1, (b, n)).transpose(0, 1)
    if topk is not None:
        return Found(indices, quantized, None, rows.new_empty(0), rows.new_zeros(codes.shape[:2], dtype=torch.int64))
    return codebook.assigned(rows, quantized, indices)


@torch.no_grad()
def _best(source, rows: Tensor, codes: Tensor, cosine: bool, temperature: float | None, topk: int | None) -> Tensor:
    found = []
    for start, own in source.chunks(codes):
        part = rows[start : start + len(own), None]
        if cosine:
            scores = (part * l2norm(own)).sum(-1)
        else:
            scores = -(part - own).square().sum(-1).sqrt()
        if temperature is not None:
            scores = scores / temperature + _plain.gumbel_noise(scores)
        found.append(scores.argmax(-1) if topk is None else scores.topk(topk, dim=-1).indices)
    return torch.cat(found) if found else torch.zeros(0, *(() if topk is None else (topk,)), dtype=torch.int64, device=rows.device)
