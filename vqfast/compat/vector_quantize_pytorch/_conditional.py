"""Lookup in codes that differ from row to row: a function of the codebook and of what was quantized before."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
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
        condition = condition.reshape(-1, condition.shape[-1])
        # A row that is not finite has no code, and the network must not see it: its gradient would have 0 times NaN.
        finite = condition.detach().isfinite().all(-1, keepdim=True)
        self.network, self.condition = network, torch.where(finite, condition, 0)

    def some(self, codes: Tensor, rows: slice) -> Tensor:
        """[n, K, D]: the codes of n rows; codes [K, D]."""
        part = self.condition[rows, None]
        return self.network(codes.expand(len(part), *codes.shape), part.expand(-1, len(codes), -1))

    def chosen(self, codes: Tensor, indices: Tensor) -> Tensor:
        """[..., D] codes of indices [rows] or [rows, k]; differentiable."""
        condition = self.condition if indices.dim() == 1 else self.condition[:, None].expand(-1, indices.shape[1], -1)
        return self.network(gather(codes, indices), condition)


class AllCodes:
    """Codes of all rows at once, as a user's function made them: [rows, K, D]."""

    def __init__(self, codes: Tensor):
        self.all = codes

    def some(self, codes: Tensor, rows: slice) -> Tensor:
        return self.all[rows]

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
    sources = _sources(codes, transform)
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


def _sources(codes: Tensor, transform) -> list[RowCodes] | list[AllCodes]:
    return [transform] if isinstance(transform, RowCodes) else [AllCodes(own.flatten(0, 1)) for own in transform(codes)]


def _step(codes: Tensor) -> int:
    """Rows whose codes are made at once."""
    return max(1, _plain.CHUNK_SCORES // codes.numel())


def _groups(rows: Tensor, codes: Tensor, transform, *more: Tensor):
    """Per codebook: (source, its rows [B N, D], codes [K, D], and the same of more tensors [B, C, N])."""
    flat = rows.transpose(0, 1).flatten(1, 2)
    return zip(_sources(codes, transform), flat, codes, *(t.transpose(0, 1).flatten(1, 2) for t in more), strict=True)


def _scores(rows: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """[n, D], [n, K, D] -> [n, K]; larger is nearer."""
    if cosine:
        return (rows[:, None] * l2norm(codes)).sum(-1)
    # At 0 a square root has no gradient.
    return -(rows[:, None] - codes).square().sum(-1).clamp(min=torch.finfo(rows.dtype).tiny).sqrt()


def logits(codebook: Codebook, rows: Tensor, codes: Tensor, transform) -> Tensor:
    """[C, B, N, K]: of all rows [B, C, N, D] and all codes that `transform` makes of codes [C, K, D]; as large as it says."""
    cosine, found = codebook.use_cosine_sim, []
    for source, group, own in _groups(rows, codes, transform):
        parts = [slice(start, start + _step(own)) for start in range(0, len(group), _step(own))]
        found.append(torch.cat([_scores(group[part], source.some(own, part), cosine) for part in parts]))
    return torch.stack(found).unflatten(1, (rows.shape[0], rows.shape[2]))


def cross_entropy(codebook: Codebook, rows: Tensor, codes: Tensor, transform, targets: Tensor) -> Tensor:
    """`_plain.cross_entropy` among the codes that `transform` makes; targets [B, C, N]."""
    cosine, sums = codebook.use_cosine_sim, [rows.new_zeros(())]
    for source, group, own, aims in _groups(rows, codes, transform, targets):
        for start in range(0, len(group), _step(own)):
            part = slice(start, start + _step(own))

            def total(rows, codes, aims, source=source, part=part):
                return F.cross_entropy(_scores(rows, source.some(codes, part), cosine), aims, ignore_index=-1, reduction="sum")

            sums.append(_plain.again_in_backward(total, group[part], own, aims[part]))
    return torch.stack(sums).sum() / (targets != -1).sum().clamp(min=1)


def diversity(codebook: Codebook, rows: Tensor, codes: Tensor, transform, temperature: float, counts: Tensor | None) -> Tensor:
    """`_plain.diversity` among the codes that `transform` makes; rows [B, C, N, D] by position."""
    b, c, n, d = rows.shape
    if rows.numel() == 0:
        return _plain.nothing(rows)
    weights, number = _plain.weights_of(rows, counts)
    cosine, step = codebook.use_cosine_sim, _step(codes[0])
    width = max(1, min(n, step))  # positions at once; and so many elements of the batch, where these hold all positions:
    batch = max(1, step // n) if width == n else 1
    groups, entropies = list(_groups(rows, codes, transform, weights)), [rows.new_zeros(())]
    for first in range(0, n, width):
        own_width, parts = min(width, n - first), []
        for source, group, own, weight in groups:
            for start in range(0, b, batch):
                last = min(start + batch, b) - 1
                part = slice(start * n + first, last * n + first + own_width)

                def shares(rows, codes, weight, source=source, part=part, positions=own_width):
                    prob = (_scores(rows, source.some(codes, part), cosine) * temperature).softmax(-1)
                    return (prob * weight[:, None]).unflatten(0, (-1, positions)).sum(0)

                parts.append(_plain.again_in_backward(shares, group[part], own, weight[part]))
        mean = torch.stack(parts).sum(0)
        entropies.append(-(mean * mean.clamp(min=1e-5).log()).sum())
    return -torch.stack(entropies).sum() / number


@torch.no_grad()
def _best(source, rows: Tensor, codes: Tensor, cosine: bool, temperature: float | None, topk: int | None) -> Tensor:
    found = []
    for start in range(0, len(rows), _step(codes)):
        part = slice(start, start + _step(codes))
        scores = _scores(rows[part], source.some(codes, part), cosine)
        if temperature is not None:
            scores = scores / temperature + _plain.gumbel_noise(scores)
        found.append(scores.argmax(-1) if topk is None else scores.topk(topk, dim=-1).indices)
    return torch.cat(found) if found else torch.zeros(0, *(() if topk is None else (topk,)), dtype=torch.int64, device=rows.device)
