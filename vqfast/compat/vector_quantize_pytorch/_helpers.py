"""Small functions that vector_quantize_pytorch 1.32 defines beside its layers, and that projects import from its modules.

Each module of this package offers the ones that its namesake has. The layers here do not need them: `cdist`, `gumbel_sample` and
`kmeans` hold N x K by nature, and so are for callers that ask for exactly that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import nn as dist_nn

from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._gradients import l2norm
from vqfast.compat.vector_quantize_pytorch._plain import gumbel_noise
from vqfast.compat.vector_quantize_pytorch._plain import orthogonality as orthogonal_loss_fn  # noqa: F401
from vqfast.nn._distributed import all_gather_rows, world
from vqfast.ops.ema import code_stats
from vqfast.ops.nearest import nearest

# ---- plain Python ------------------------------------------------------------------------------------------------------------


def exists(val: Any) -> bool:
    """Whether `val` is not None."""
    return val is not None


def default(val: Any, d: Any) -> Any:
    """`val`, or `d` in place of None."""
    return d if val is None else val


def first_given(*args: Any) -> Any:
    """The first argument that is not None; None if there is none. `default` of the FSQ and FSP modules."""
    return next((arg for arg in args if arg is not None), None)


def first_given_called(*args: Any) -> Any:
    """`first_given`, called where that is a function. `default` of the LFQ module."""
    found = first_given(*args)
    return found() if callable(found) else found


def noop(*args: Any, **kwargs: Any) -> None:
    """Nothing."""


def identity(t: Any) -> Any:
    """`t`."""
    return t


def maybe(fn: Callable) -> Callable:
    """`fn` that hands None through."""

    @wraps(fn)
    def passing_none(x, *args, **kwargs):
        return None if x is None else fn(x, *args, **kwargs)

    return passing_none


def first(it: Any) -> Any:
    """Its element 0."""
    return it[0]


def unique(arr: Iterable) -> list:
    """Its distinct elements, in no order."""
    return list(set(arr))


def cast_tuple(t: Any, length: int = 1) -> tuple:
    """`t` if it is a tuple, else `length` times `t`."""
    return t if isinstance(t, tuple) else (t,) * length


def at_most_one_of(*bools: Any) -> bool:
    """Whether no more than one of them is true."""
    return sum(bool(b) for b in bools) < 2


def round_up_multiple(num: float, mult: int) -> int:
    """The least multiple of `mult` that is not under `num`."""
    return math.ceil(num / mult) * mult


def chain(*modules: nn.Module | None) -> nn.Module | None:
    """`Sequential` of the VectorQuantize module: nn.Sequential of what is not None; a single module itself; None of none."""
    given = [module for module in modules if module is not None]
    return nn.Sequential(*given) if len(given) > 1 else (given[0] if given else None)


# ---- shapes ------------------------------------------------------------------------------------------------------------------


def is_empty(t: Tensor) -> bool:
    """Whether it has no element."""
    return t.numel() == 0


def append_dims_to(t: Tensor, ndims: int) -> Tensor:
    """t with axes of size 1 at its end, up to `ndims` axes."""
    require(t.dim() <= ndims, f"t is {list(t.shape)}, which has more than {ndims} axes.")
    return t[(..., *(None,) * (ndims - t.dim()))]


def pad_shape(shape: Iterable[int], size: int, dim: int = 0) -> list[int]:
    """`shape` with `size` in place `dim`."""
    return [size if axis == dim else length for axis, length in enumerate(shape)]


def pad_at_dim(t: Tensor, pad: tuple[int, int], dim: int = -1, value: float = 0.0) -> Tensor:
    """t with `pad` more elements of `value` before and after axis `dim`."""
    after = t.dim() - 1 - dim % t.dim()  # axes behind it, which F.pad wants first
    return F.pad(t, (0, 0) * after + tuple(pad), value=value)


def lens_to_mask(lens: Tensor, max_length: int) -> Tensor:
    """Lengths [B] as a mask [B, max_length], True for valid positions."""
    return torch.arange(max_length, device=lens.device) < lens[:, None]


def pack(t: Tensor, pattern: str) -> tuple[Tensor, list[torch.Size]]:
    """t with the axes that `*` stands for joined into one, and their sizes; pattern as of einops.pack, "b * d" say."""
    names = pattern.split()
    before, after = names.index("*"), len(names) - 1 - names.index("*")
    require(t.dim() >= before + after, f"t is {list(t.shape)}, too few axes for {pattern!r}.")
    inside = t.shape[before : t.dim() - after]
    return t.reshape(*t.shape[:before], math.prod(inside), *t.shape[t.dim() - after :]), [inside]


def unpack(t: Tensor, ps: list[torch.Size], pattern: str) -> Tensor:
    """Inverse of `pack`; the axis that `*` stands for is split again."""
    axis = pattern.split().index("*")
    return t.reshape(*t.shape[:axis], *ps[0], *t.shape[axis + 1 :])


def pack_with_inverse(t: Tensor, pattern: str) -> tuple[Tensor, Callable[..., Tensor]]:
    """`pack`, and a function of (tensor, its pattern or None for the same) that splits the axis again."""
    packed, ps = pack(t, pattern)
    return packed, lambda out, inv_pattern=None: unpack(out, ps, inv_pattern or pattern)


def batch_select(t: Tensor, indices: Tensor, pattern: str | None = None) -> Tensor:
    """Elements of t [..., J, *] at indices [..., J']; `*` are the axes that pattern names behind J, none without one."""
    trailing = len(pattern.split()) - 2 if pattern else t.dim() - 2
    index = indices[(..., *(None,) * trailing)].expand(*indices.shape, *t.shape[t.dim() - trailing :])
    return t.gather(indices.dim() - 1, index)


# ---- numbers -----------------------------------------------------------------------------------------------------------------


def safe_div(num: Tensor, den: Tensor, eps: float = 1e-6) -> Tensor:
    """num / max(den, eps)."""
    return num / den.clamp(min=eps)


def log(t: Tensor, eps: float = 1e-20) -> Tensor:
    """Logarithm of max(t, eps)."""
    return t.clamp(min=eps).log()


def log_of_share(t: Tensor, eps: float = 1e-5) -> Tensor:
    """`log` of the LFQ module."""
    return log(t, eps)


def entropy(prob: Tensor, eps: float = 1e-5) -> Tensor:
    """Entropy in nats along the last axis, logarithms of shares under `eps` cut off."""
    return -(prob * log(prob, eps)).sum(-1)


def cdist(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """Distances [b, n, m] between x [b, n, d] and y [b, m, d]; squared ones under `eps` count as `eps`."""
    squared = x.square().sum(-1)[..., None] + y.square().sum(-1)[..., None, :] - 2 * (x @ y.mT)
    return squared.clamp(min=eps).sqrt()


def laplace_smoothing(x: Tensor, n_categories: int, eps: float = 1e-5, dim: int = -1) -> Tensor:
    """Counts as shares that sum to 1, `eps` added to each."""
    return (x + eps) / (x.sum(dim=dim, keepdim=True) + n_categories * eps)


def uniform_init(*shape: int) -> Tensor:
    """Uniform values of He et al.'s variance."""
    return nn.init.kaiming_uniform_(torch.empty(shape))


def frac_gradient(t: Tensor, frac: float) -> Tensor:
    """t with its gradient scaled by `frac`."""
    return t.detach() if frac <= 0 else frac * t + (1.0 - frac) * t.detach()


def efficient_rotation_trick_transform(u: Tensor, q: Tensor, e: Tensor) -> Tensor:
    """e [n, d] under the rotation that takes unit vectors u to q, as a constant: e - 2 w (w.e) + 2 q (u.e)."""
    u, q, w = u.detach(), q.detach(), l2norm(u + q, dim=1).detach()
    return e - 2 * (e * w).sum(-1, keepdim=True) * w + 2 * (e * u).sum(-1, keepdim=True) * q


def gumbel_sample(
    logits: Tensor,
    temperature: float = 1.0,
    stochastic: bool = False,
    straight_through: bool = False,
    dim: int = -1,
    training: bool = True,
    topk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices of the largest logits along `dim`, or in training with `stochastic` a draw of softmax(logits / temperature).

    Returns:
        (indices without `dim`, or with the k best along it, and their one-hot rows in logits' dtype along a last axis; with
        `straight_through` in training these have the gradient of the softmax).
    """
    draws = stochastic and training and temperature > 0
    scores = logits / temperature + gumbel_noise(logits) if draws else logits
    indices = scores.argmax(dim) if topk is None else scores.topk(topk, dim=dim).indices
    one_hot = F.one_hot(indices, logits.shape[dim]).to(logits.dtype)
    if straight_through and training and temperature > 0:
        soft = (logits / temperature).softmax(dim)
        one_hot = one_hot + soft - soft.detach()
    return indices, one_hot


# ---- moving averages ---------------------------------------------------------------------------------------------------------


def accum_grad_(t: Tensor, grad: Tensor) -> None:
    """Add `grad` to t.grad."""
    t.grad = grad.detach().clone() if t.grad is None else t.grad + grad


def ema_inplace(old: Tensor, new: Tensor, decay: float, weight: Tensor | float | None = None) -> None:
    """old <- lerp(old, new + old.grad, (1 - decay) * weight), and old.grad is spent; weight per code [K] or [C, K]."""
    if old.grad is not None:
        new, old.grad = new + old.grad, None
    share = 1.0 - decay
    if isinstance(weight, Tensor):
        weight = weight[None] if weight.dim() == 1 else weight
        require(weight.shape == old.shape[:2], f"weight is {list(weight.shape)}; it must be [K] or [C, K] of {list(old.shape)}.")
        share = share * append_dims_to(weight, old.dim()).to(old)
    elif weight is not None:
        share = share * weight
    old.data.lerp_(new.to(old), share)


# ---- samples and k-means -----------------------------------------------------------------------------------------------------


def sample_vectors(samples: Tensor, num: int) -> Tensor:
    """`num` rows of samples [n, ...] at random, without repeats where there are enough."""
    n, device = samples.shape[0], samples.device
    picked = torch.randperm(n, device=device)[:num] if n >= num else torch.randint(0, n, (num,), device=device)
    return samples[picked]


def batched_sample_vectors(samples: Tensor, num: int) -> Tensor:
    """`sample_vectors` of each element of samples [b, n, ...]."""
    return torch.stack([sample_vectors(own, num) for own in samples])


def sample_multinomial(total_count: int, probs: Tensor) -> Tensor:
    """How often each of len(probs) outcomes came in `total_count` draws, int64."""
    drawn = torch.multinomial(probs.cpu().float(), total_count, replacement=True) if total_count else torch.zeros(0, dtype=torch.long)
    return drawn.bincount(minlength=len(probs)).to(probs.device)


def batched_bincount(x: Tensor, *, minlength: int) -> Tensor:
    """How often each number under `minlength` stands in each row of x [b, n]; x's dtype."""
    return x.new_zeros(x.shape[0], minlength).scatter_add_(-1, x, torch.ones_like(x))


def kmeans(
    samples: Tensor,
    num_clusters: int,
    num_iters: int = 10,
    use_cosine_sim: bool = False,
    sample_fn: Callable = batched_sample_vectors,
    all_reduce_fn: Callable = noop,
) -> tuple[Tensor, Tensor]:
    """Lloyd's iteration on samples [C, n, D]: (means [C, num_clusters, D], the last counts); an empty cluster keeps its mean."""
    means = sample_fn(samples, num_clusters)
    counts = torch.zeros(means.shape[:2], dtype=torch.int64, device=samples.device)
    for _ in range(num_iters):
        buckets = nearest(samples, means, metric="dot" if use_cosine_sim else "l2").indices
        stats = [code_stats(own, found, num_clusters) for own, found in zip(samples, buckets, strict=True)]
        sums, counts = torch.stack([s.sums for s in stats]), torch.stack([s.counts for s in stats])
        all_reduce_fn(counts)
        all_reduce_fn(sums)
        fresh = (sums / counts.clamp(min=1)[..., None]).to(means.dtype)
        means = torch.where((counts > 0)[..., None], l2norm(fresh) if use_cosine_sim else fresh, means)
    return means, counts


# ---- processes ---------------------------------------------------------------------------------------------------------------


def is_distributed() -> bool:
    """Whether there are several processes, asked anew each time."""
    return world(None)[1] > 1


def maybe_distributed_mean(t: Tensor) -> Tensor:
    """The mean of t over the processes, with gradient."""
    return dist_nn.all_reduce(t) / world(None)[1] if is_distributed() else t


def all_gather_sizes(x: Tensor, dim: int) -> Tensor:
    """x.shape[dim] of every process, [processes] int64."""
    own = torch.tensor(x.shape[dim], dtype=torch.long, device=x.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    return torch.stack(sizes)


def all_gather_variably_sized(x: Tensor, sizes: Iterable[int], dim: int = 0) -> list[Tensor]:
    """x of every process, whose axis `dim` is as long as `sizes` says."""
    parts = [
        x.contiguous() if rank == dist.get_rank() else x.new_empty(pad_shape(x.shape, int(size), dim)) for rank, size in enumerate(sizes)
    ]
    for rank, part in enumerate(parts):
        dist.broadcast(part, src=rank)
    return parts


def sample_vectors_distributed(local_samples: Tensor, num: int) -> Tensor:
    """`num` rows of the processes' samples [1, n, D] together, the same on all of them: [1, num, D]."""
    rows = all_gather_rows(local_samples[0], None)
    picked = torch.randperm(len(rows))[:num] if len(rows) >= num else torch.randint(0, len(rows), (num,))
    picked = picked.to(rows.device)
    dist.broadcast(picked, src=0)
    return rows[picked][None]
