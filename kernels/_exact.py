"""The contract's formula (docs/CONTRACT.md, line 1) in float64: what decides between close codes, on every backend alike.

Every operation is rounded once, d ascends, products and sums are not fused: a kernel that calls these functions must be launched
with `enable_fp_fusion=False`. Inputs are at most float32, so no float64 operation here overflows or underflows, and a score that is
not finite means that the row or the code is not.
"""

import triton
import triton.language as tl

L2 = tl.constexpr(0)
COSINE = tl.constexpr(1)
DOT = tl.constexpr(2)


@triton.jit
def _pair_score(rows, row_stride, codes, code_stride, D, METRIC: tl.constexpr, BLOCK: tl.constexpr):
    """Score of one code per row; smaller is nearer; inf where the code or the row is not finite.

    rows, codes: [BLOCK] pointers to element 0 of each row and of its code. One lane walks one pair: the sum over d is sequential.
    """
    total = tl.zeros([BLOCK], tl.float64)
    norm = tl.zeros([BLOCK], tl.float64)
    for d in range(0, D):
        x = tl.load(rows).to(tl.float32).to(tl.float64)
        c = tl.load(codes).to(tl.float32).to(tl.float64)
        if METRIC == L2:
            difference = x - c
            total = total + difference * difference
        else:
            total = total + x * c
            norm = norm + c * c
        # Pointers step, so that no 32-bit product of d and a stride can overflow.
        rows += row_stride
        codes += code_stride
    return _score(total, norm, METRIC)


@triton.jit
def _score(total, norm, METRIC: tl.constexpr):
    """What nearest minimises, from the sums over d; inf instead of anything that is not finite."""
    valid = tl.abs(total) < float("inf")
    if METRIC == L2:
        score = total
    elif METRIC == DOT:
        score = -total
    else:
        valid = valid & (norm < float("inf"))
        score = tl.where(norm > 0.0, -(total / tl.sqrt(tl.where(norm > 0.0, norm, 1.0))), 0.0)
    return tl.where(valid, score, float("inf"))


@triton.jit
def _distance(score, rows, row_stride, D, METRIC: tl.constexpr, BLOCK: tl.constexpr):
    """The distance that the op returns, rounded once to float32; NaN where no code has a finite score."""
    distance = score
    if METRIC == COSINE:
        norm = tl.zeros([BLOCK], tl.float64)
        for d in range(0, D):
            x = tl.load(rows).to(tl.float32).to(tl.float64)
            norm = norm + x * x
            rows += row_stride
        distance = tl.where(norm > 0.0, 1.0 + score / tl.sqrt(tl.where(norm > 0.0, norm, 1.0)), 1.0)
    return tl.where(score < float("inf"), distance, float("nan")).to(tl.float32)


@triton.jit
def _settle_first(pointers, stride_d, codes, stride_k, code_stride_d, K, D, first, METRIC: tl.constexpr, BLOCK_N: tl.constexpr):
    """Score and index of one candidate per row, by the contract's formula."""
    index = tl.minimum(first, K - 1).to(tl.int64)
    return _pair_score(pointers, stride_d, codes + index * stride_k, code_stride_d, D, METRIC, BLOCK_N), index


@triton.jit
def _settle_rival(score, index, pointers, stride_d, codes, stride_k, code_stride_d, K, D, other, two, METRIC: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """Score and index of the nearer of (score, index) and, in rows that have `two` candidates, the other one; ties to the lower index."""
    rival = tl.minimum(other, K - 1).to(tl.int64)
    rival_score = tl.full([BLOCK_N], float("inf"), tl.float64)
    if tl.max(two.to(tl.int32), 0) > 0:  # hands on one vector as it was loaded: Triton 3.7 cannot translate more for AMD
        rival_score = _pair_score(pointers, stride_d, codes + rival * stride_k, code_stride_d, D, METRIC, BLOCK_N)
    wins = two & ((rival_score < score) | ((rival_score == score) & (rival < index)))
    return tl.where(wins, rival_score, score), tl.where(wins, rival, index)
