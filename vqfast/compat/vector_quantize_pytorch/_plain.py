"""What needs more than each row's nearest code: samples, k nearest, soft assignments; plain torch, one chunk of rows at a time.

Rows are [B, C, N, D], codes [C, K, D]: C codebooks. No function holds more than about `CHUNK_SCORES` scores, neither in forward
nor for backward: a chunk's scores are computed again where a gradient needs them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vqfast.compat.vector_quantize_pytorch._gradients import l2norm

CHUNK_SCORES = 1 << 20  # 4 MiB of float32, about what a core's caches hold

# Squared distances under this count as this in the soft assignments: their square root has no finite gradient at 0.
_MIN_SQUARED = 1e-8


def logits(rows: Tensor, codes: Tensor, cosine: bool) -> Tensor:
    """[..., n, D], [..., K, D] -> [..., n, K]: minus the distance, or the inner product; larger is nearer."""
    with torch.autocast(rows.device.type, enabled=False):
        work = torch.promote_types(torch.promote_types(rows.dtype, codes.dtype), torch.float32)
        rows, codes = rows.to(work), codes.to(work)
        if cosine:
            return rows @ codes.mT
        # Centred first: the expanded square loses all digits where an offset dwarfs the distances.
        centre = codes.detach().mean(-2, keepdim=True)
        rows, codes = rows - centre, codes - centre
        squared = rows.square().sum(-1)[..., None] + codes.square().sum(-1)[..., None, :] - 2 * (rows @ codes.mT)
        return -squared.clamp(min=_MIN_SQUARED).sqrt()


def _chunk_rows(codes: Tensor) -> int:
    return max(1, 4 * CHUNK_SCORES // (codes.shape[-2] * max(4, codes.element_size())))


def again_in_backward(function, *tensors):
    """function(*tensors), its intermediates dropped and computed again in backward."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors if isinstance(t, Tensor))):
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def gumbel_noise(t: Tensor) -> Tensor:
    """Standard Gumbel noise of t's shape."""
    uniform = torch.zeros_like(t).uniform_(0, 1)
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()


@torch.no_grad()
def pick(rows: Tensor, codes: Tensor, cosine: bool, *, temperature: float | None, topk: int | None) -> Tensor:
    """Indices of the best codes, [B, C, N], or [B, C, N, k] best first.

    With a temperature codes are drawn from softmax(logits / temperature) (Gumbel-max); without one scores are float64.
    """
    b, c, n, d = rows.shape
    flat = rows.transpose(0, 1).reshape(c, b * n, d)
    flat = flat if temperature else flat.double()
    found = []
    for group, own in zip(flat, codes if temperature else codes.double(), strict=True):
        for part in group.split(_chunk_rows(own)):
            scores = logits(part, own, cosine)
            if temperature:
                scores = scores / temperature + gumbel_noise(scores)
            found.append(scores.argmax(-1) if topk is None else scores.topk(topk, dim=-1).indices)
    tail = () if topk is None else (topk,)
    if not found or not b * n:
        return torch.zeros(b, c, n, *tail, dtype=torch.int64, device=rows.device)
    return torch.cat(found).reshape(c, b, n, *tail).transpose(0, 1)


def soft_codes(rows: Tensor, codes: Tensor, cosine: bool, temperature: float) -> Tensor:
    """softmax(logits / temperature) @ codes, [B, C, N, D]; differentiable in both, in codes through the logits alone."""
    b, c, n, d = rows.shape

    def mean(part, own):
        shares = (logits(part, own, cosine) / temperature).softmax(-1)
        return shares @ own.detach().to(shares.dtype)

    flat = rows.transpose(0, 1).reshape(c, b * n, d)
    out = [
        torch.cat([again_in_backward(mean, part, own) for part in group.split(_chunk_rows(codes))])
        for group, own in zip(flat, codes, strict=True)
    ]
    return torch.stack(out).reshape(c, b, n, d).transpose(0, 1)


def cross_entropy(rows: Tensor, codes: Tensor, targets: Tensor, cosine: bool) -> Tensor:
    """Mean cross entropy of softmax(logits) against targets [B, C, N]; target -1 does not count; 0 where none counts."""
    b, c, n, d = rows.shape
    flat = rows.transpose(0, 1).reshape(c, b * n, d)
    aims = targets.transpose(0, 1).reshape(c, b * n)

    def total(part, own, aim):
        return F.cross_entropy(logits(part, own, cosine), aim, ignore_index=-1, reduction="sum")

    step = _chunk_rows(codes)
    sums = [
        again_in_backward(total, part, own, aim)
        for group, own, aims_of_group in zip(flat, codes, aims, strict=True)
        for part, aim in zip(group.split(step), aims_of_group.split(step), strict=True)
    ]
    return torch.stack(sums).sum() / (targets != -1).sum().clamp(min=1)


def diversity(rows: Tensor, codes: Tensor, cosine: bool, temperature: float, counts: Tensor | None = None) -> Tensor:
    """Minus the mean over positions n of the entropy (nats) of the batch's mean of softmax(logits * temperature).

    counts: bool [B, C, N], which rows do; None = all. A position where none does is left out; 0 without any.
    """
    b, c, n, d = rows.shape
    if rows.numel() == 0:
        return nothing(rows)
    weights, number = weights_of(rows, counts)

    def shares(part, own, weights):  # [b', n', D] -> [n', K]
        prob = (logits(part, own, cosine) * temperature).softmax(-1)
        return prob.sum(0) / (b * c) if counts is None else (prob * weights[..., None]).sum(0)

    at_once = _chunk_rows(codes)
    positions, batch = max(1, at_once // (b * c)), min(b, at_once)

    def entropy(part, weights, *own):  # [b, C, n', D], [b, C, n'] -> []
        parts = [
            again_in_backward(shares, p, o, w)
            for g, o in enumerate(own)
            for p, w in zip(part[:, g].split(batch), weights[:, g].split(batch), strict=True)
        ]
        mean = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return -(mean * mean.clamp(min=1e-5).log()).sum()

    chunks = zip(rows.split(positions, dim=2), weights.split(positions, dim=2), strict=True)
    parts = [again_in_backward(entropy, *chunk, *codes.unbind(0)) for chunk in chunks]
    return -torch.stack(parts).sum() / number


def weights_of(rows: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each row's share in the mean of its position, [B, C, N], 0 where it does not count; number of positions that have one."""
    counts = torch.ones(rows.shape[:3], dtype=torch.bool, device=rows.device) if counts is None else counts
    number = counts.sum((0, 1))
    return counts / number.clamp(min=1), (number > 0).sum().clamp(min=1)


def nothing(rows: Tensor) -> Tensor:
    """The loss of no rows: 0, float32 or wider."""
    return rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32))


def orthogonality(codes: Tensor) -> Tensor:
    """Mean squared cosine between codes, less 1 / K; eq. 2 of Shin et al. 2021 (arXiv 2112.00384). codes [C, K, D] -> [].

    |E E'|^2 = |E' E|^2 in the Frobenius norm, so the smaller of the two products is formed. 0 without codes.
    """
    c, k, d = codes.shape
    if k == 0:
        return codes.sum()
    unit = l2norm(codes)
    gram = unit.mT @ unit if d < k else unit @ unit.mT
    return (gram.square().sum() / (c * k) - 1) / k
