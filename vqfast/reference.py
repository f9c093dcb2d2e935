"""What every op means, in plain torch; the only oracle. Any device, float64 included; chunked, so it never holds N x K.

All functions take the canonical shapes: x [B, G, N, D], codebook [G, K, D], indices [B, G, N], mask [B, N].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

L2, COSINE, DOT = 0, 1, 2

# Scores held at one time by a chunk of rows: 2^22 float64 values are 32 MiB.
_CHUNK_SCORES = 1 << 22


# ---- nearest ---------------------------------------------------------------------------------------------------------------


def nearest(x: Tensor, codebook: Tensor, metric: int, order=None, basis=None, guess=None) -> tuple[Tensor, Tensor]:
    """Index of the nearest code, and its distance; the hints are ignored."""
    b, g, n, _ = x.shape
    float64 = torch.float64 in (x.dtype, codebook.dtype)
    distance = torch.empty(b, g, n, dtype=torch.float64 if float64 else torch.float32, device=x.device)
    indices = torch.empty(b, g, n, dtype=torch.int64, device=x.device)
    step = max(1, _CHUNK_SCORES // codebook.shape[1])
    for group in range(g):
        codes = codebook[group].to(torch.float64)
        screen = _Screen(codes, metric)
        for batch in range(b):
            for start in range(0, n, step):
                rows = slice(start, min(n, start + step))
                chunk = x[batch, group, rows].to(torch.float64)
                found_distance, found = _nearest_chunk(chunk, codes, metric, screen)
                distance[batch, group, rows] = found_distance.to(distance.dtype)
                indices[batch, group, rows] = found
    return distance, indices


def pair_score(x: Tensor, codes: Tensor, metric: int) -> Tensor:
    """The contract's formula (line 1): what nearest minimises, in float64, ascending d, each operation rounded once.

    x and codes broadcast against each other in all axes but the last, [..., D] -> [...]. A code that is not finite scores inf.
    """
    shape = torch.broadcast_shapes(x.shape[:-1], codes.shape[:-1])
    total = x.new_zeros(shape)
    norm = codes.new_zeros(codes.shape[:-1])
    for d in range(x.shape[-1]):
        if metric == L2:
            difference = x[..., d] - codes[..., d]
            total = total + difference * difference
        else:
            total = total + x[..., d] * codes[..., d]
            norm = norm + codes[..., d] * codes[..., d]
    if metric == COSINE:
        total = torch.where(norm > 0, total / _sqrt(norm), 0.0)
    score = total if metric == L2 else -total
    return torch.where(codes.isfinite().all(-1) & ~score.isnan(), score, torch.inf)


def _sqrt(values: Tensor) -> Tensor:
    """Correctly rounded square root: torch's own on the CPU may be off by one ulp (2.13 gives 1.4142135623730949 for 2.0)."""
    if values.device.type != "cpu":
        return values.sqrt()
    roots = [math.sqrt(v) for v in values.flatten().tolist()]
    return torch.tensor(roots, dtype=values.dtype).reshape(values.shape)


def _distance_of_score(score: Tensor, x: Tensor, metric: int) -> Tensor:
    if metric != COSINE:
        return score
    norm = x.new_zeros(x.shape[:-1])
    for d in range(x.shape[-1]):
        norm = norm + x[..., d] * x[..., d]
    return torch.where(norm > 0, 1.0 + score / _sqrt(norm), 1.0)


class _Screen:
    """A float64 matrix product that tells which codes can be nearest, so that few need the formula above."""

    def __init__(self, codes: Tensor, metric: int):
        finite = codes.isfinite().all(-1)
        self.any_code = finite.any()
        self.codes = torch.where(finite[:, None], codes, 0.0)
        if metric == L2:
            self.codes = self.codes - self.codes.mean(0)
            self.centre = torch.where(finite[:, None], codes, 0.0).mean(0)
        else:
            self.centre = torch.zeros_like(codes[0])
        norm = self.codes.square().sum(-1)
        if metric == COSINE:
            self.codes = torch.where(norm[:, None] > 0, self.codes / norm.sqrt()[:, None], 0.0)
            norm = self.codes.square().sum(-1)
        self.offset = norm / 2 if metric == L2 else torch.zeros_like(norm)
        self.offset = torch.where(finite, self.offset, torch.inf)
        self.scale = norm.sqrt()

    def near(self, x: Tensor) -> Tensor:
        """[n, K] bool: False only where the code is certainly not the nearest."""
        x = x - self.centre
        score = torch.addmm(self.offset, x, self.codes.T, alpha=-1)
        length = x.square().sum(-1, keepdim=True).sqrt()
        # Rounding of a D-term dot product, of the centring and of the formula itself, generously: (D + 16) ulps of |c|^2 + |x|^2.
        bound = (x.shape[-1] + 16) * torch.finfo(torch.float64).eps * (self.scale.square() + length.square())
        best = (score + bound).min(-1, keepdim=True).values
        near = score - bound <= best
        return near | ~best.isfinite()


def _nearest_chunk(x: Tensor, codes: Tensor, metric: int, screen: _Screen) -> tuple[Tensor, Tensor]:
    near = screen.near(x)
    indices = near.to(torch.uint8).argmax(-1)
    score = pair_score(x, codes[indices], metric)
    # Rows with more than one candidate are settled by the formula itself, against every code.
    unsure = (near.sum(-1) > 1).nonzero().squeeze(-1)
    step = max(1, _CHUNK_SCORES // (4 * codes.shape[0]))
    for part in unsure.split(step):
        scores = pair_score(x[part, None, :], codes[None], metric)
        score[part], indices[part] = scores.min(-1)
    distance = _distance_of_score(score, x, metric)
    invalid = ~x.isfinite().all(-1) | ~screen.any_code
    return torch.where(invalid, torch.nan, distance), torch.where(invalid, 0, indices)


# ---- hints -----------------------------------------------------------------------------------------------------------------


def hint_directions(dim: int) -> int:
    """How many principal directions a codebook of `dim` dimensions is remembered by."""
    return min(dim, 3 if dim < 4 else 9 if dim < 128 else 11)


def search_hints(codebook: Tensor, metric: int) -> tuple[Tensor, Tensor]:
    """Principal directions of the codes, and the codes in the order of the first one; those that are not finite come last."""
    codes = codebook.to(torch.float64)
    finite = codes.isfinite().all(-1, keepdim=True)
    codes = torch.where(finite, codes, 0.0)
    if metric == COSINE:
        codes = torch.nn.functional.normalize(codes, dim=-1)
    codes = torch.where(finite, codes - codes.sum(1, keepdim=True) / finite.sum(1, keepdim=True).clamp(min=1), 0.0)
    scale = codes.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    codes = codes / scale  # so that no square leaves float64
    basis = torch.linalg.eigh(codes.mT @ codes).eigenvectors.mT.flip(1)[:, : hint_directions(codes.shape[-1])]
    place = torch.where(finite, codes @ basis[:, :1].mT, torch.inf)
    return place.squeeze(-1).argsort(dim=-1, stable=True), basis.to(torch.float32).contiguous()


# ---- gather ----------------------------------------------------------------------------------------------------------------


def gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """codebook[g, indices[b, g, n]]; index -1 gives zeros, any other index out of range raises IndexError."""
    g, k, d = codebook.shape
    _check_range(indices, k)
    b, _, n = indices.shape
    flat = indices.transpose(0, 1).reshape(g, b * n)
    rows = codebook.gather(1, flat.clamp(0, k - 1)[..., None].expand(-1, -1, d))
    rows = torch.where((flat >= 0)[..., None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
    return rows.reshape(g, b, n, d).transpose(0, 1).contiguous()


def _check_range(indices: Tensor, codebook_size: int) -> None:
    # Elsewhere than on the CPU the check would wait for the device.
    if indices.device.type != "cpu" or not indices.numel():
        return
    low, high = (int(v) for v in indices.aminmax())
    if low < -1 or high >= codebook_size:
        raise IndexError(
            f"indices hold values from {low} to {high}, but the codebook has {codebook_size} codes; an index must lie in"
            f" 0..{codebook_size - 1}, or be -1 for a masked position."
        )


# ---- ema -------------------------------------------------------------------------------------------------------------------


def code_stats(x: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """sums[g, k] of the rows that chose code k, and their counts; index -1 and rows that are not finite are left out."""
    b, g, n, d = x.shape
    _check_range(indices, codebook_size)
    rows = x.transpose(0, 1).reshape(g, b * n, d).to(torch.float64)
    flat = indices.transpose(0, 1).reshape(g, b * n)
    keep = (flat >= 0) & rows.isfinite().all(-1)
    # Dropped rows go to one extra code, so that shapes do not depend on the data.
    flat = torch.where(keep, flat, codebook_size)
    rows = torch.where(keep[..., None], rows, 0.0)
    sums = rows.new_zeros(g, codebook_size + 1, d)
    counts = torch.zeros(g, codebook_size + 1, dtype=torch.int64, device=x.device)
    for group in range(g):
        # index_put_ with accumulate sums in a fixed order on every device.
        sums[group].index_put_((flat[group],), rows[group], accumulate=True)
        counts[group].index_put_((flat[group],), torch.ones_like(flat[group]), accumulate=True)
    sums = sums[:, :-1].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return sums.contiguous(), counts[:, :-1].contiguous()


def ema_update_(
    codebook: Tensor, cluster_size: Tensor, cluster_sum: Tensor, sums: Tensor, counts: Tensor, frozen, decay: float, eps: float
) -> None:
    """Move the running sizes and sums towards this step's, and the codebook to their ratio, in place.

    A code whose size falls under eps, and a frozen code, keep their value. A group without any row changes nothing, nor does a step
    change anything of a code whose sum would not be finite.
    """
    any_row = counts.sum(-1, keepdim=True) > 0  # [G, 1]
    # Both factors are rounded from double: 1 - decay taken in float32 would be off by percents for a decay near 1.
    keep = torch.where(any_row, torch.tensor(decay, dtype=torch.float64, device=counts.device), 1.0)
    keep, take = keep.to(cluster_size.dtype), (1.0 - keep).to(cluster_size.dtype)
    total = cluster_sum * keep[..., None] + sums.to(cluster_sum.dtype) * take[..., None]
    counts_in = total.isfinite().all(-1)
    size = cluster_size * keep + counts.to(cluster_size.dtype) * take
    cluster_size.copy_(torch.where(counts_in, size, cluster_size))
    cluster_sum.copy_(torch.where(counts_in[..., None], total, cluster_sum))
    mean = cluster_sum / cluster_size.clamp(min=eps)[..., None]
    # A mean that overflowed would turn a finite code into a non-finite one: such a code also keeps its value.
    moves = (any_row & counts_in & (cluster_size >= eps))[..., None] & mean.isfinite().all(-1, keepdim=True)
    if frozen is not None:
        moves = moves & ~frozen[..., None]
    codebook.copy_(torch.where(moves, mean, codebook))


# ---- quantize --------------------------------------------------------------------------------------------------------------


def laid_out_like(x: Tensor, rows: Tensor) -> Tensor:
    """rows in x's dtype and in its memory layout, where that has neither gaps nor overlaps: images stay channels-first."""
    like = torch.empty_like(x)
    return rows if rows.dtype == x.dtype and rows.stride() == like.stride() else like.copy_(rows)


def quantize(
    x: Tensor, codebook: Tensor, mask, metric: int, with_sums: bool, order=None, basis=None, guess=None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """nearest, gather, squared error and code statistics of one step; see vqfast.ops.quantize for the outputs."""
    g, k, d = codebook.shape
    distance, indices = nearest(x, codebook, metric)
    quantized = gather(codebook, indices)
    finite = ~distance.isnan()
    valid = finite if mask is None else finite & mask[:, None, :]
    difference = torch.where(valid[..., None], x.to(torch.float64) - quantized.to(torch.float64), 0.0)
    row_error = torch.nn.functional.pad(difference.square().sum(-1).flatten(), (1, 0))
    # A running sum over rows: its bits do not depend on how many threads share the work. On a GPU those of sum() do not either, and
    # those of cumsum() do.
    total = row_error.cumsum(0)[-1] if row_error.device.type == "cpu" else row_error.sum()
    sq_error = total.expand(2).contiguous()
    quantized = torch.where(finite[..., None], quantized.to(x.dtype), torch.nan)
    nonfinite = (~finite if mask is None else ~finite & mask[:, None, :]).sum()
    if mask is not None:
        quantized = torch.where(mask[:, None, :, None], quantized, 0)
        indices = torch.where(mask[:, None, :], indices, -1)
    sums, counts = code_stats(x, torch.where(valid, indices, -1), k)
    if not with_sums:
        sums = x.new_empty(0, dtype=sums.dtype)
    return laid_out_like(x, quantized), sq_error, indices, sums, counts, nonfinite


def straight_through(grad: Tensor | None, x: Tensor, codes: Tensor, indices: Tensor, factor) -> Tensor:
    """grad + factor (x - code), [B, G, N, D] in x's dtype, from rows or a codebook of codes; see vqfast.ops.straight_through.

    Plain torch, so that it has a gradient of its own.
    """
    rows = codes if codes.dim() == 4 else gather(codes, indices)
    work = torch.promote_types(torch.promote_types(x.dtype, codes.dtype), torch.float32)
    pull = where_counted(x.to(work) - rows.to(work), indices)
    pull = pull * torch.as_tensor(factor, dtype=work, device=x.device)
    if grad is not None:  # no addcmul, which may round once where the native op rounds twice
        pull = torch.where((indices >= 0)[..., None], grad, 0).to(work) + pull
    return pull.to(x.dtype)


def where_counted(rest: Tensor, indices: Tensor) -> Tensor:
    """rest [B, G, N, D], 0 in rows that are masked or not finite."""
    low, high = rest.detach().aminmax(dim=-1)  # isfinite().all(-1) would go over the rows five times
    counts = (indices >= 0) & (low > -torch.inf) & (high < torch.inf)
    return torch.where(counts[..., None], rest, 0)


# ---- residual --------------------------------------------------------------------------------------------------------------


def residual(
    x: Tensor, codebooks: Tensor, mask, metric: int, with_sums: bool, with_pull: bool, level=quantize
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Q quantizers in a row, each on what the ones before left over; see vqfast.ops.residual for the outputs.

    `level` quantizes as `quantize` does.
    """
    work = torch.promote_types(torch.promote_types(x.dtype, codebooks.dtype), torch.float32)
    rest = x.to(work)
    pull = torch.zeros_like(rest) if with_pull else rest.new_empty(0)
    quantized, found = None, []
    for codebook in codebooks:
        codes, *others = level(rest, codebook, mask, metric, with_sums)
        found.append(others)
        rest = rest - codes.to(work)
        if with_pull:
            counted = (others[1] >= 0)[..., None] & ~rest[..., :1].isnan()  # rows that are not finite have no code
            pull = pull + torch.where(counted, rest, 0)
        quantized = codes if quantized is None else quantized + codes
    sq_error, indices, sums, counts, nonfinite = zip(*found, strict=True)
    sums, indices, counts = torch.stack(sums), torch.stack(indices), torch.stack(counts)
    sums = sums if with_sums else sums.flatten()
    pull = pull.contiguous()
    return laid_out_like(x, quantized), torch.stack(sq_error).sum(0), indices, sums, counts, nonfinite[0], pull
