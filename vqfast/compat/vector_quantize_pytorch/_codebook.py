"""The codebook inside `VectorQuantize`: lookup, moving averages, replacement of dead codes, k-means start."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqfast import _backends, _border
from vqfast.compat.vector_quantize_pytorch import _helpers, _plain
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._gradients import l2norm
from vqfast.compat.vector_quantize_pytorch._helpers import gumbel_sample
from vqfast.nn import _revival
from vqfast.nn._base import WideState, rerun_in_backward
from vqfast.nn._distributed import all_gather_rows, all_reduce_stats, world
from vqfast.nn._hints import HintKeeper
from vqfast.ops import _shapes, quantize
from vqfast.ops.gather import gather
from vqfast.ops.nearest import nearest
from vqfast.ops.straight_through import difference

# Rows that each process offers per step as replacements of dead codes.
_SLOTS = 1024


class Found(NamedTuple):
    """Result of `Codebook.lookup`."""

    indices: Tensor  # [B, C, N] or [B, C, N, k] int64, -1 where masked
    quantized: Tensor  # indices' shape + [D]; gradient to a learnable codebook, none to the rows
    sq_error: Tensor | None  # [2] float64, the same sum twice: gradient to the rows, gradient to the codes; None for the k nearest
    sums: Tensor  # [C, K, D], or [0] without with_sums
    counts: Tensor  # [C, K] int64


def code_stats(rows: Tensor, indices: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """Sums [C, K, D] and counts [C, K] of rows [B, C, N, D] per index [B, C, N]; -1 and non-finite rows count nowhere."""
    return _border.call("code_stats", _backends.choose("ema", None, rows))(rows, indices, codebook_size)


class Codebook(WideState):
    """C codebooks of K codes; state-dict keys `initted`, `cluster_size` [C, K], `embed_avg` and `embed` [C, K, D].

    Rows are [B, C, N, D]. `lookup` changes nothing but, where k-means or affine statistics are due, their start; `learn` is
    the one writer in training.
    """

    _wide_state = (
        "embed", "embed_avg", "cluster_size", "_held_size", "_held_sum", "batch_mean", "batch_variance", "codebook_mean", "codebook_variance"
    )  # fmt: skip

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 2,
        reset_cluster_size: float | None = None,
        use_ddp: bool | None = None,
        learnable_codebook: bool = False,
        gumbel_sample: Callable = gumbel_sample,
        sample_codebook_temp: float = 1.0,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        affine_param: bool = False,
        sync_affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        use_cosine_sim: bool = False,
        vq_bridge: nn.Module | None = None,
    ):
        super().__init__()
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.kmeans_iters, self.sync_kmeans = kmeans_iters, sync_kmeans
        self.decay, self.eps = decay, eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.has_dead_code_replacement = threshold_ema_dead_code > 0
        self.reset_cluster_size = threshold_ema_dead_code if reset_cluster_size is None else reset_cluster_size
        self.sync_codebook = use_ddp
        self.learnable_codebook = learnable_codebook
        require(
            getattr(gumbel_sample, "func", gumbel_sample) is _helpers.gumbel_sample,
            "gumbel_sample must be the function of that name, or a functools.partial of it.",
        )
        self.gumbel_sample, self.sample_codebook_temp = gumbel_sample, sample_codebook_temp
        options = getattr(gumbel_sample, "keywords", {})
        self.stochastic, self.straight_through = (options.get(name, False) for name in ("stochastic", "straight_through"))
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.use_cosine_sim = use_cosine_sim
        self.vq_bridge = vq_bridge

        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = l2norm(embed) if use_cosine_sim else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # False once the codes are known to be there: reading the buffer in every forward would wait for the device.
        self._may_need_init = kmeans_init
        self._hints = HintKeeper()
        self.register_buffer("_held_size", None, persistent=False)
        self.register_buffer("_held_sum", None, persistent=False)
        self.register_buffer("_turn", torch.zeros((), dtype=torch.int64), persistent=False)

        self.affine_param, self.sync_affine_param = affine_param, sync_affine_param
        if affine_param:
            self.affine_param_batch_decay, self.affine_param_codebook_decay = affine_param_batch_decay, affine_param_codebook_decay
            self.register_buffer("batch_mean", None)
            self.register_buffer("batch_variance", None)
            self.register_buffer("codebook_mean_needs_init", torch.tensor(True))
            self.register_buffer("codebook_mean", torch.zeros(num_codebooks, 1, dim))
            self.register_buffer("codebook_variance_needs_init", torch.tensor(True))
            self.register_buffer("codebook_variance", torch.zeros(num_codebooks, 1, dim))

    # -- state -----------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("batch_mean", "batch_variance") if self.affine_param else ():
            saved = state_dict.get(prefix + name)  # there once a forward has run, so a fresh layer makes room for it
            setattr(self, name, None if saved is None else torch.zeros_like(saved, device=self.embed.device, dtype=self.embed.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._may_need_init = not bool(self.initted)

    @property
    def metric(self) -> str:
        """Metric of the search: codes and rows are normalised for cosine, so the inner product is the cosine."""
        return "dot" if self.use_cosine_sim else "l2"

    @property
    def use_ddp(self) -> bool:
        """Whether statistics are summed over processes; decided when it is asked, not when the layer was built."""
        return self.sync_codebook is not False and world(None)[1] > 1

    def transform_input(self, x: Tensor) -> Tensor:
        """l2-normalise the last axis for cosine similarity, else x itself."""
        return l2norm(x) if self.use_cosine_sim else x

    def codes(self) -> Tensor:
        """The codes that a lookup compares with, [C, K, D]: `embed` after the bridge and the affine map."""
        codes = self.embed if self.learnable_codebook else self.embed.detach()
        codes = codes if self.vq_bridge is None else self.vq_bridge(codes)
        if self.affine_param and self.batch_mean is not None:
            codes = self._to_input_space(codes)
        return codes

    # -- lookup ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, rows: Tensor, mask: Tensor | None = None) -> None:
        """Before a lookup: the k-means start where it is due, and in training the affine statistics. rows [B, C, N, D], mask [B, N]."""
        if self._may_need_init:
            self.init_embed_(rows, mask)
        if self.affine_param and self.training:
            self._update_affine(rows, mask)

    def lookup(
        self, rows: Tensor, codes: Tensor, mask: Tensor | None = None, *, temperature=None, soft=None, topk=None, with_sums=False
    ) -> Found:
        """Codes for rows [B, C, N, D] (mask [B, N] bool): the nearest ones; drawn ones with a temperature; or the k nearest.

        soft: the temperature of the softmax over all codes whose gradient the result takes, in place of none to the rows.
        """
        if temperature is None and topk is None:
            metric = _shapes.check_metric(self.metric)
            step = quantize.step(rows, codes, mask, metric=metric, with_sums=with_sums, hints=self._hints.of(rows, codes, metric))
            quantized = gather(codes, step.indices) if codes.requires_grad else step.quantized.detach()
            quantized = self._softly(quantized, rows, codes, soft)
            return Found(step.indices, quantized, step.sq_error, step.sums, step.counts)
        indices = _plain.pick(rows, codes, self.use_cosine_sim, temperature=temperature, topk=topk)
        if mask is not None:
            indices = indices.masked_fill(~mask.view(mask.shape[0], 1, mask.shape[1], *(1,) * (indices.dim() - 3)), -1)
        quantized = gather(codes, indices.flatten(2)).unflatten(2, indices.shape[2:])
        if topk is not None:
            return Found(indices, quantized, None, rows.new_empty(0), rows.new_zeros(codes.shape[:2], dtype=torch.int64))
        return self.assigned(rows, self._softly(quantized, rows, codes, soft), indices)

    def _softly(self, quantized: Tensor, rows: Tensor, codes: Tensor, temperature: float | None) -> Tensor:
        """`quantized` with the gradient of softmax(logits / temperature) @ codes."""
        if temperature is None:
            return quantized
        soft = _plain.soft_codes(rows, codes, self.use_cosine_sim, temperature).to(quantized.dtype)
        return quantized + (soft - soft.detach())

    def assigned(self, rows: Tensor, quantized: Tensor, indices: Tensor) -> Found:
        """Error and statistics of rows whose codes were found by other means than the search."""
        error = torch.stack(
            [
                difference(rows, quantized.detach(), indices).square().sum(dtype=torch.float64),
                difference(rows.detach(), quantized, indices).square().sum(dtype=torch.float64),
            ]
        )
        return Found(indices, quantized, error, *code_stats(rows.detach(), indices, self.codebook_size))

    def forward(
        self,
        x: Tensor,
        sample_codebook_temp: float | None = None,
        mask: Tensor | None = None,
        freeze_codebook: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        topk: int | None = None,
        update_usage: bool = True,
    ):
        """Look up x [b, n, d] or [C, b, n, d] and, in training, learn from it; the seam that other code calls directly.

        Args: as of `VectorQuantize`; mask [b, n], or of the batch that heads in b share. update_usage: whether to learn.

        Returns:
            (codes of x's shape, indices [b, n] or [C, b, n], minus distances [C, b, n, K]); the last one is N x K by nature. With
            topk codes and indices have an axis of k behind n.
        """
        stacked = x if x.dim() == 4 else x[None]
        rows = stacked.transpose(0, 1)
        if mask is not None:
            mask = mask.repeat_interleave(len(rows) // len(mask), 0)
        self.prepare(rows.detach(), mask)
        learns = self.training and update_usage and not freeze_codebook and topk is None
        codes = self.codes()
        codes = codes.clone() if learns else codes
        temperature, soft = self.temperatures(sample_codebook_temp)
        if codebook_transform_fn is not None:
            from vqfast.compat.vector_quantize_pytorch import _conditional

            found = _conditional.lookup(self, rows, codes, codebook_transform_fn, mask, temperature=temperature, topk=topk)
            distances = _conditional.logits(self, rows, codes, codebook_transform_fn)
        else:
            soft = soft if topk is None else None
            found = self.lookup(rows, codes, mask, temperature=temperature, soft=soft, topk=topk, with_sums=learns)
            distances = _plain.logits(stacked.flatten(1, 2), codes, self.use_cosine_sim).unflatten(1, stacked.shape[1:3])
        if learns:
            self.learn(rows.detach(), found, weight=ema_update_weight, accumulate=accum_ema_update, ema_update=ema_update)
        quantized, indices = found.quantized.transpose(0, 1), found.indices.transpose(0, 1)
        return (quantized, indices, distances) if x.dim() == 4 else (quantized[0], indices[0], distances)

    def temperatures(self, asked: float | None = None) -> tuple[float | None, float | None]:
        """Of drawing codes, and of the softmax over all of them that gives the gradient; None where there is none."""
        temperature = self.sample_codebook_temp if asked is None else asked
        if not self.training or temperature <= 0:
            return None, None
        return temperature if self.stochastic else None, temperature if self.straight_through else None

    # -- moving averages -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def learn(self, rows: Tensor, found: Found, *, weight=None, accumulate: bool = False, ema_update: bool | None = None) -> None:
        """Move the averages towards a batch, then the codes to their ratio, then replace dead codes.

        size <- lerp(size, n, w), sum <- lerp(sum, s, w), w = (1 - decay) * weight; code <- sum / Laplace-smoothed size.

        Args:
            rows: [B, C, N, D], as looked up. found: their codes, with sums.
            weight: per code [K] or [C, K], or a function of (sums, counts) that returns it.
            accumulate: only keep sums and counts, for the next call without it.
            ema_update: overrides the codebook's own setting.
        """
        ema = self.ema_update if ema_update is None else ema_update
        if not (ema or self.has_dead_code_replacement) or rerun_in_backward():
            return
        sums, counts, pool = found.sums, found.counts, None
        if self.use_ddp:
            pool = self._candidates(rows, found.indices, _SLOTS if self.has_dead_code_replacement else 0)
            sums, counts, pool = all_reduce_stats(sums, counts, pool, None)
        size = counts.to(self.cluster_size.dtype)
        sums = self._from_input_space(sums, size[..., None])
        weight = weight(sums, size) if callable(weight) else weight
        if accumulate:
            self._held_size = size if self._held_size is None else self._held_size + size
            self._held_sum = sums if self._held_sum is None else self._held_sum + sums
            return
        if self._held_size is not None:
            size, sums = size + self._held_size, sums + self._held_sum
            self._held_size = self._held_sum = None
        self._average(size, sums, weight)
        if ema and not self.manual_ema_update:
            self._follow(size.sum(-1)[:, None, None] > 0)
        self._replace_dead(rows, found.indices, pool)

    def _average(self, size: Tensor, sums: Tensor, weight: Tensor | None) -> None:
        # A codebook without any row this step keeps its averages.
        share = (size.sum(-1, keepdim=True) > 0).to(size.dtype) * (1.0 - self.decay)  # [C, 1]
        if weight is not None:
            weight = torch.as_tensor(weight, dtype=size.dtype, device=size.device)
            fits = weight.dim() < 2 or weight.shape == size.shape
            require(fits, f"ema_update_weight is {list(weight.shape)}; it must be [K] or [C, K], here {list(size.shape)}.")
            share = share * weight
        share = share.expand_as(size)
        self.cluster_size.data.lerp_(size, share)
        self.embed_avg.data.lerp_(sums.to(self.embed_avg.dtype), share[..., None])

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set every code to its averaged sum over its Laplace-smoothed averaged size."""
        self._follow(torch.ones((), dtype=torch.bool, device=self.embed.device))

    def _follow(self, where: Tensor) -> None:
        """`update_ema` where the bool [C, 1, 1] or [] says so."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        mean = self.transform_input(self.embed_avg / smoothed[..., None])
        usable = where & mean.isfinite().all(-1, keepdim=True)  # 0 / 0 or an overflow leaves the code as it is
        self.embed.data.copy_(torch.where(usable, mean, self.embed))

    def relearn(self, rows: Tensor, indices: Tensor, mask: Tensor | None = None, **kwargs) -> None:
        """`learn` from rows [B, C, N, D] and indices [B, C, N] that were found earlier; -1 and mask [B, N] = False leave rows out."""
        if mask is not None:
            indices = indices.masked_fill(~mask[:, None], -1)
        stats = code_stats(rows.detach(), indices, self.codebook_size)
        self.learn(rows.detach(), Found(indices, rows, None, *stats), **kwargs)

    def update_indices(
        self,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Learn from x [b, n, d] or [C, b, n, d] and the indices that `forward` gave; arguments as of `forward`."""
        stacked, found = (x, embed_ind) if x.dim() == 4 else (x[None], embed_ind[None])
        mask = None if mask is None else mask.repeat_interleave(stacked.shape[1] // len(mask), 0)
        options = {"weight": ema_update_weight, "accumulate": accum_ema_update, "ema_update": ema_update}
        self.relearn(stacked.transpose(0, 1), found.reshape(stacked.shape[:-1]).transpose(0, 1), mask, **options)

    # for callers of the older name
    update_ema_indices = update_indices

    def update_codebook(
        self,
        flatten: Tensor,
        embed_onehot: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Learn from rows [C, n, D] and their one-hot rows [C, n, K]; mask [C, n], True = valid."""
        indices = embed_onehot.argmax(-1)
        indices = indices if mask is None else indices.masked_fill(~mask, -1)
        options = {"weight": ema_update_weight, "accumulate": accum_ema_update, "ema_update": ema_update}
        self.relearn(flatten[None], indices[None], **options)

    # -- dead codes ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:
        """Replace codes whose averaged size is under the threshold by rows of batch_samples [C, ..., D]; training only."""
        if not self.training or not self.has_dead_code_replacement:
            return
        rows = batch_samples.flatten(1, -2)[None]
        indices = torch.zeros(rows.shape[:3], dtype=torch.int64, device=rows.device)
        if seq_mask is not None:
            indices = indices.masked_fill(~seq_mask.reshape(1, 1, -1), -1)
        pool = None
        if self.use_ddp:
            empty = self.embed_avg.new_zeros(*self.cluster_size.shape, 0)
            counts = torch.zeros_like(self.cluster_size, dtype=torch.int64)
            pool = all_reduce_stats(empty, counts, self._candidates(rows, indices, _SLOTS), None)[2]
        self._replace_dead(rows, indices, pool)

    @torch.no_grad()
    def replace(self, batch_samples: Tensor, batch_mask: Tensor, seq_mask: Tensor | None = None) -> None:
        """Put rows of batch_samples [C, n, D] (seq_mask [C, n] of them) in place of the codes of batch_mask [C, K]; needs no training."""
        rows = self.transform_input(batch_samples)[None]
        indices = torch.zeros(rows.shape[:3], dtype=torch.int64, device=rows.device)
        indices = indices if seq_mask is None else indices.masked_fill(~seq_mask[None], -1)
        self._put(self._candidates(rows, indices, min(self.codebook_size, rows.shape[2])), batch_mask)

    def _candidates(self, rows: Tensor, indices: Tensor, slots: int) -> Tensor:
        """Rows in random order, [C, slots, D + 1], valid ones first and marked by a last column of 1; zeros after them."""
        rows = rows.transpose(0, 1).flatten(1, 2).to(self.embed_avg.dtype)
        valid = (indices.transpose(0, 1).flatten(1, 2) >= 0) & rows.isfinite().all(-1)
        out = rows.new_zeros(rows.shape[0], slots, rows.shape[-1] + 1)
        for group, good, pool in zip(rows, valid, out, strict=True):
            if group.device.type == "cpu" and not torch.compiler.is_compiling():
                order = good.nonzero()[:, 0]  # drawn from what is valid, as in the other library
                order = order[torch.randperm(len(order))][: len(pool)]
            else:  # without asking the device how many are valid
                order = torch.randperm(len(group), device=group.device)
                order = order[(~good)[order].to(torch.int8).argsort(stable=True)][: len(pool)]
            pool[: len(order), :-1] = torch.where(good[order, None], group[order], 0)
            pool[: len(order), -1] = good[order]
        return out

    def _replace_dead(self, rows: Tensor, indices: Tensor, pool: Tensor | None) -> None:
        """Give dead codes rows: of this process, or of the pool [C, processes * slots, D + 1]."""
        if not self.has_dead_code_replacement or not self.training:
            return
        dead = self.cluster_size < self.threshold_ema_dead_code
        if pool is None:
            # Where asking costs nothing, no random number is drawn for nothing.
            if dead.device.type == "cpu" and not torch.compiler.is_compiling() and not dead.any():
                return
            pool = self._candidates(rows, indices, min(self.codebook_size, rows.shape[0] * rows.shape[2]))
        else:
            pool = pool.unflatten(1, (-1, _SLOTS)).transpose(1, 2).flatten(1, 2)  # the processes take turns
        self._put(pool, dead)

    def _put(self, pool: Tensor, dead: Tensor) -> None:
        """Rows of a pool [C, slots, D + 1] in place of the codes of dead [C, K]."""
        pool = torch.cat((self._from_input_space(pool[..., :-1], 1.0), pool[..., -1:]), -1)
        # With fewer rows than dead codes, others are served each time.
        number, real = dead.sum(-1, keepdim=True), (pool[..., -1] > 0).sum(-1, keepdim=True)
        turn = (dead.cumsum(-1) - 1 - self._turn * real) % number.clamp(min=1)
        self._turn.add_(1)
        replaced = _revival.replace_dead_(self.embed.data, dead & (turn < real), pool)
        size = self.reset_cluster_size
        self.cluster_size.data.copy_(torch.where(replaced, size, self.cluster_size))
        self.embed_avg.data.copy_(torch.where(replaced[..., None], self.embed.detach() * size, self.embed_avg))

    # -- k-means ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """Set the codes by k-means on rows [B, C, N, D], once; waits while there is no valid row."""
        if bool(self.initted):
            self._may_need_init = False
            return
        keep = data.isfinite().all(-1).all(1) if mask is None else mask & data.isfinite().all(-1).all(1)  # [B, N]
        rows = data.transpose(1, 2)[keep].transpose(0, 1)  # [C, n, D]
        shared = self.use_ddp and self.sync_kmeans
        start = [self._draw(group, shared) for group in rows]
        if not all(len(codes) for codes in start):
            return
        means, bins = self._lloyd(rows, torch.stack(start), shared)
        self.embed_avg.data.copy_(means * bins[..., None])
        self.cluster_size.data.copy_(bins)
        self.update_ema()
        self.initted.fill_(True)
        self._may_need_init = False

    def _draw(self, rows: Tensor, shared: bool) -> Tensor:
        """K rows at random, with repeats where there are fewer, none from none; of all processes where shared."""
        number = len(rows)
        if 0 < number < self.codebook_size and not shared:
            warnings.warn(f"k-means got {number} rows for {self.codebook_size} codes; some codes will be equal.", stacklevel=2)
        if number >= self.codebook_size or shared:
            drawn = rows[torch.randperm(number, device=rows.device)[: self.codebook_size]]
        else:
            drawn = rows[torch.randint(0, number, (self.codebook_size,), device=rows.device)] if number else rows
        if not shared:
            return drawn
        turns = all_gather_rows(torch.arange(len(drawn), device=rows.device, dtype=torch.float64)[:, None], None)
        drawn = all_gather_rows(drawn, None)[turns[:, 0].argsort(stable=True)]  # the processes take turns
        return drawn[torch.arange(self.codebook_size, device=rows.device) % max(len(drawn), 1)] if len(drawn) else drawn

    def _lloyd(self, rows: Tensor, means: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
        """Lloyd's iteration on rows [C, n, D]: means [C, K, D] and the last counts [C, K]; an empty cluster keeps its mean."""
        counts = torch.ones(means.shape[:2], dtype=torch.int64, device=means.device)
        for _ in range(self.kmeans_iters):
            indices = nearest(rows[None], means, metric=self.metric).indices
            sums, counts = code_stats(rows[None], indices, self.codebook_size)
            if shared:
                sums, counts, _ = all_reduce_stats(sums, counts, sums.new_zeros(len(sums), 0, sums.shape[-1] + 1), None)
            fresh = self.transform_input(sums / counts.clamp(min=1)[..., None])
            means = torch.where((counts > 0)[..., None], fresh, means.to(fresh.dtype))
        return means, counts

    # -- affine map between the space of the codes and that of the rows -----------------------------------------------------

    def _deviations(self) -> tuple[Tensor, Tensor]:
        return self.batch_variance.clamp(min=1e-5).sqrt(), self.codebook_variance.clamp(min=1e-5).sqrt()

    def _to_input_space(self, codes: Tensor) -> Tensor:
        batch, codebook = self._deviations()
        return (codes - self.codebook_mean) * (batch / codebook) + self.batch_mean

    def _from_input_space(self, sums: Tensor, counts: Tensor | float) -> Tensor:
        """Sums [C, n, D] of `counts` rows each, as the sums of the rows mapped to the space of the codes."""
        if not self.affine_param or self.batch_mean is None:
            return sums
        batch, codebook = self._deviations()
        return (sums - counts * self.batch_mean) * (codebook / batch) + counts * self.codebook_mean

    def _update_affine(self, rows: Tensor, mask: Tensor | None) -> None:
        codes = self.embed.detach()
        self._decay("codebook", codes.mean(1, keepdim=True), codes.var(1, correction=0, keepdim=True))
        rows = rows.transpose(0, 1).flatten(1, 2).to(codes.dtype)  # [C, n, D]
        keep = rows.isfinite().all(-1, keepdim=True)
        if mask is not None:
            keep = keep & mask.reshape(1, -1, 1)
        shared = self.sync_affine_param and world(None)[1] > 1
        # Two passes, the second about the mean: one pass of squares would cancel.
        number, total = self._summed(keep, torch.where(keep, rows, 0), shared)
        mean = total / number.clamp(min=1)
        _, squares = self._summed(keep, torch.where(keep, rows - mean, 0).square(), shared)
        variance = squares / number.clamp(min=1)
        if self.batch_mean is not None:  # without a valid row the averages stay
            mean, variance = torch.where(number > 0, mean, self.batch_mean), torch.where(number > 0, variance, self.batch_variance)
        self._decay("batch", mean, variance)

    @staticmethod
    def _summed(keep: Tensor, values: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
        number, total = keep.sum(1, keepdim=True), values.sum(1, keepdim=True)
        if shared:
            total, number, _ = all_reduce_stats(total, number[..., 0], total.new_zeros(len(total), 0, total.shape[-1] + 1), None)
            number = number[..., None]
        return number, total

    def _decay(self, which: str, mean: Tensor, variance: Tensor) -> None:
        """Average the mean and variance of the `codebook` or the `batch`; the first values are taken as they are."""
        decay = self.affine_param_codebook_decay if which == "codebook" else self.affine_param_batch_decay
        for name, new in ((f"{which}_mean", mean), (f"{which}_variance", variance)):
            old = getattr(self, name)
            if old is None:
                setattr(self, name, new)
            elif which == "codebook":
                first = getattr(self, f"{name}_needs_init")
                old.copy_(torch.where(first, new, old * decay + new * (1 - decay)))
                first.fill_(False)
            else:
                old.copy_(old * decay + new * (1 - decay))
