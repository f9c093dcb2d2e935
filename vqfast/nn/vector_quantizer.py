"""VectorQuantizer (codebook learned by its loss) and VectorQuantizerEMA (codebook follows a moving average)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqfast._border import is_traced
from vqfast.nn import _layout, _revival
from vqfast.nn._base import QuantizerBase, mask_rows, rerun_in_backward
from vqfast.nn._distributed import all_reduce_stats, world
from vqfast.nn._ema import RULES
from vqfast.ops import quantize
from vqfast.ops.quantize import Quantized

# Rows that each process offers per step as replacements of dead codes.
_REVIVAL_SLOTS = 64


class _Quantizer(QuantizerBase):
    """Forward, statistics protocol and revival, common to both ways of learning."""

    def __init__(
        self,
        dim,
        codebook_size,
        *,
        commitment_weight,
        metric,
        groups,
        codebook_dim,
        channel_dim,
        revive_below,
        auto_update,
        process_group,
    ):
        super().__init__(
            dim,
            codebook_size,
            metric=metric,
            groups=groups,
            codebook_dim=codebook_dim,
            channel_dim=channel_dim,
            process_group=process_group,
        )
        if not (commitment_weight >= 0 and revive_below >= 0):
            raise ValueError(f"commitment_weight and revive_below must not be negative, got {commitment_weight}, {revive_below}.")
        self.commitment_weight, self.revive_below, self.auto_update = commitment_weight, revive_below, auto_update
        self._any_frozen = False

    def _register_state(self) -> None:
        """Buffers beside the codebook; called by subclasses once the codebook is there."""
        sizes = self.codebook.shape[:-1]
        self.register_buffer("cluster_size", torch.ones(sizes))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros(sizes, dtype=torch.bool))
        if not self.auto_update:
            grouped = self._grouped(self.codebook.detach())
            self.register_buffer("pending_counts", torch.zeros(grouped.shape[:2], dtype=torch.int64), persistent=False)
            self.register_buffer("pending_sums", torch.zeros(self._sums_shape()), persistent=False)
            pool = torch.zeros(grouped.shape[0], self._slots(), grouped.shape[-1] + 1)
            self.register_buffer("pending_pool", pool, persistent=False)

    def _slots(self) -> int:
        return _REVIVAL_SLOTS if self.revive_below > 0 else 0

    def _sums_shape(self) -> tuple[int, ...]:
        """Shape of the row sums that this layer's update needs; the last axis is 0 where it needs none."""
        raise NotImplementedError

    def _reset_state(self) -> None:
        self.cluster_size.fill_(1.0)
        self.updates.zero_()
        if not self.auto_update:
            self.pending_counts.zero_()
            self.pending_sums.zero_()
            self.pending_pool.zero_()

    # -- forward ---------------------------------------------------------------------------------------------------------

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize z.

        **Shapes**: z [B, ..., D] with channels at `channel_dim`; mask bool, z's shape without that axis, True = valid.

        Returns:
            Quantized: quantized in z's layout and dtype, indices (see `encode`), losses, perplexity, usage, nonfinite.

        In training mode this adds the batch to the layer's statistics and, with auto_update, updates the codebook after the
        lookup.
        """
        return self._forward(z, mask, self._search)

    def _forward(self, z: Tensor, mask: Tensor | None, search) -> Quantized:
        repeated = self.training and rerun_in_backward()
        if repeated and self.auto_update:
            raise RuntimeError(
                f"{type(self).__name__} ran again inside backward (activation checkpointing), after its codebook had already"
                " moved. Build it with auto_update=False and call update_() once per optimizer step."
            )
        rows, like = self._rows(z, mask)
        learns = self.training and not repeated
        step = search(rows, None if mask is None else mask_rows(mask), learns and self._needs_sums())
        counts = step.counts
        if learns:
            # Nothing here carries a gradient. An exported program that holds a no_grad() block cannot be loaded again, and a
            # compiled graph without one may mix up its outputs (both torch 2.13).
            if torch.compiler.is_exporting():
                counts = self._collect(rows.detach(), step)
            else:
                with torch.no_grad():
                    counts = self._collect(rows.detach(), step)
        return self._result(step, counts, like, mask)

    def _result(self, step: quantize.Step, counts: Tensor, like: tuple[int, ...], mask: Tensor | None) -> Quantized:
        # The losses are means over this process's rows; perplexity and usage come from all processes' counts.
        dim = step.quantized.shape[-1]
        commitment_loss, codebook_loss = quantize.losses(step.sq_error, self._valid_rows(step), dim)
        codebook_loss = self._codebook_loss(codebook_loss)
        perplexity, usage = quantize.code_metrics(counts)
        return Quantized(
            self._to_layout(step.quantized, like, mask),
            self._indices_to_user(step.indices, like),
            codebook_loss + self.commitment_weight * commitment_loss,
            commitment_loss,
            codebook_loss,
            perplexity,
            usage,
            step.nonfinite,
        )

    def _valid_rows(self, step: quantize.Step) -> Tensor:
        return step.counts.sum()

    def _indices_to_user(self, indices: Tensor, like: tuple[int, ...]) -> Tensor:
        return _layout.indices_to_user(indices, like)

    def _search(self, rows: Tensor, mask: Tensor | None, with_sums: bool) -> quantize.Step:
        codebook = self._grouped(self._lookup_codebook(rows))
        hints = self._hints.of(rows, codebook, self.metric_code)
        return quantize.step(rows, codebook, mask, metric=self.metric_code, with_sums=with_sums, hints=hints)

    def _needs_sums(self) -> bool:
        return self._sums_shape()[-1] > 0

    def _collect(self, rows: Tensor, step: quantize.Step) -> Tensor:
        """Add a training batch to the statistics; returns the counts that perplexity is reported from."""
        sums = step.sums if self._needs_sums() else self.codebook.new_zeros(self._sums_shape())
        pool = self._candidates(rows, step)
        if self.auto_update:
            return self._advance(sums, step.counts, pool)
        self.pending_counts += step.counts
        self.pending_sums += sums
        if pool.shape[1]:
            self.pending_pool[:, : pool.shape[1]] = pool
        return step.counts

    def _candidates(self, rows: Tensor, step: quantize.Step) -> Tensor:
        return _revival.candidates(rows, step.indices, step.quantized, self.updates, self._slots())

    @torch.no_grad()
    def update_(self) -> None:
        """Apply the pending statistics to the codebook; with auto_update=False call it once per optimizer step, on every process.

        With auto_update=True there is nothing pending and nothing happens.
        """
        if self.auto_update:
            return
        self._advance(self.pending_sums.clone(), self.pending_counts.clone(), self.pending_pool.clone())
        self.pending_counts.zero_()
        self.pending_sums.zero_()
        self.pending_pool.zero_()

    def _advance(self, sums: Tensor, counts: Tensor, pool: Tensor) -> Tensor:
        """All-reduce, move the codebook, replace dead codes; returns the all-reduced counts."""
        if pool.shape[1] < self._slots() and world(self.process_group)[1] > 1:
            # Fixed shapes on every process, however few rows it had.
            pool = nn.functional.pad(pool, (0, 0, 0, self._slots() - pool.shape[1]))
        sums, counts, pool = all_reduce_stats(sums, counts, pool, self.process_group)
        self._learn(sums, counts)
        any_row = counts.sum() > 0
        if self._slots():
            self._revive(pool, any_row)
        self.updates += any_row
        return counts

    def _revive(self, pool: Tensor, any_row: Tensor) -> None:
        size = self._grouped(self.cluster_size)
        dead = (size < self.revive_below) & ~self._grouped(self.frozen) & any_row
        if dead.device.type == "cpu" and not is_traced() and not dead.any():
            return  # asking costs nothing here, and what follows goes over the whole codebook
        codebook = self._grouped(self.codebook.data)
        replaced = _revival.replace_dead_(codebook, dead, pool)
        fresh = max(1.0, 2.0 * self.revive_below)
        size.copy_(torch.where(replaced, fresh, size))
        self._revived(codebook, replaced, fresh)

    # -- what the two ways of learning fill in -----------------------------------------------------------------------------

    def _lookup_codebook(self, rows: Tensor) -> Tensor:
        return self.codebook

    def _codebook_loss(self, codebook_loss: Tensor) -> Tensor:
        raise NotImplementedError

    def _learn(self, sums: Tensor, counts: Tensor) -> None:
        raise NotImplementedError

    def _revived(self, codebook: Tensor, replaced: Tensor, fresh: float) -> None:
        """Keep other state in step with replaced codes."""


class VectorQuantizer(_Quantizer):
    """Vector quantizer whose codebook is a parameter, trained by the codebook loss.

    loss = mean (sg[z] - code)^2 + commitment_weight * mean (z - sg[code])^2

    Args:
        dim: channels of z.
        codebook_size: number of codes K (per group).
        commitment_weight: the paper's beta.
        metric: "l2", "cosine" (z and codes are l2-normalised) or "dot".
        groups: split the channels into this many groups with a codebook each.
        codebook_dim: project z linearly to this many channels before the search, and back after it.
        channel_dim: axis of z that holds the channels: -1, or 1 for images and other channels-first data.
        revive_below: replace a code by a row of the batch once its moving count per step falls under this; 0 = never.
        auto_update: training forwards do the dead-code work themselves; with False the trainer calls `update_()`.
        process_group: of the all-reduce; by default the default group at call time.

    Attributes:
        codebook: Parameter [K, D] (or [G, K, D]), float32. cluster_size: moving average (0.99) of the counts per step.

    Source: van den Oord et al. 2017, eq. 3; the paper sums over D where the losses here are means.
    """

    _wide_state = ("codebook", "cluster_size", "pending_sums", "pending_pool", "_held")

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        commitment_weight: float = 0.25,
        metric: str = "l2",
        groups: int = 1,
        codebook_dim: int | None = None,
        channel_dim: int = -1,
        revive_below: float = 0.0,
        auto_update: bool = True,
        process_group=None,
    ):
        super().__init__(
            dim,
            codebook_size,
            commitment_weight=commitment_weight,
            metric=metric,
            groups=groups,
            codebook_dim=codebook_dim,
            channel_dim=channel_dim,
            revive_below=revive_below,
            auto_update=auto_update,
            process_group=process_group,
        )
        self.codebook = nn.Parameter(self._initial_codebook())
        self._register_state()
        self.register_buffer("_held", None, persistent=False)  # the codebook as it was when codes of it were frozen

    def _sums_shape(self) -> tuple[int, ...]:
        return *self._grouped(self.codebook).shape[:2], 0

    def _codes(self) -> Tensor:
        self._put_back_frozen()
        return self._on_the_sphere(self.codebook)

    def _on_the_sphere(self, codebook: Tensor) -> Tensor:
        return nn.functional.normalize(codebook, dim=-1) if self.metric == "cosine" else codebook

    def _lookup_codebook(self, rows: Tensor) -> Tensor:
        self._put_back_frozen()
        # Backward needs the codes as they were before dead ones are replaced.
        codebook = self._on_the_sphere(self.codebook.clone() if self.training and self._slots() else self.codebook)
        return torch.where(self.frozen[..., None], codebook.detach(), codebook) if self._any_frozen else codebook

    # An optimizer's momentum and weight decay move a code whose gradient is 0.

    def _put_back_frozen(self) -> None:
        if self._any_frozen:
            with torch.no_grad():
                self.codebook.data.copy_(torch.where(self.frozen[..., None], self._held, self.codebook))

    def _hold_frozen(self) -> None:
        self._held = self.codebook.detach().clone() if self._any_frozen else None

    def freeze_(self, codes: Tensor | None = None) -> None:
        """Stop learning of all codes, or of those where the bool tensor `codes` ([K] or [G, K]) is True. Frozen codes still serve.

        What an optimizer's momentum or weight decay does to them is undone when the layer is next used or saved.
        """
        self._put_back_frozen()
        super().freeze_(codes)
        self._hold_frozen()

    def unfreeze_(self) -> None:
        self._put_back_frozen()
        super().unfreeze_()
        self._hold_frozen()

    def _reset_state(self) -> None:
        super()._reset_state()
        self._hold_frozen()

    def _save_to_state_dict(self, *args, **kwargs):
        self._put_back_frozen()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._hold_frozen()

    def _codebook_loss(self, codebook_loss: Tensor) -> Tensor:
        return codebook_loss

    def _learn(self, sums: Tensor, counts: Tensor) -> None:
        size = self._grouped(self.cluster_size)
        keep = torch.where((counts.sum(-1, keepdim=True) > 0), 0.99, 1.0).to(size.dtype)
        size.mul_(keep).add_(counts.to(size.dtype) * (1 - keep))


class VectorQuantizerEMA(_Quantizer):
    """Vector quantizer whose codebook follows an exponential moving average of the rows that chose each code.

    loss = commitment_weight * mean (z - sg[code])^2

    Args:
        decay: share of the old average kept per step. eps: see `rule`.
        rule: "ema" (sizes start at 1, sums at the codebook; a code whose size falls under eps keeps its value) or "debiased"
            (Sonnet's: averages start at 0 and are debiased, sizes are Laplace-smoothed with eps).
        auto_update: every training forward updates the codebook; with False forward only collects, and the trainer calls
            `update_()` once per optimizer step (gradient accumulation, activation checkpointing, several forwards per step).
        dim, codebook_size, commitment_weight, metric, groups, codebook_dim, channel_dim, revive_below, process_group: see
            `VectorQuantizer`.

    Attributes:
        codebook, cluster_sum: buffers [K, D] (or [G, K, D]); cluster_size [K]; float32.

    Source: van den Oord et al. 2017, appendix A.1.
    """

    _wide_state = ("codebook", "cluster_size", "cluster_sum", "pending_sums", "pending_pool")

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        rule: str = "ema",
        commitment_weight: float = 0.25,
        metric: str = "l2",
        groups: int = 1,
        codebook_dim: int | None = None,
        channel_dim: int = -1,
        revive_below: float = 0.0,
        auto_update: bool = True,
        process_group=None,
    ):
        super().__init__(
            dim,
            codebook_size,
            commitment_weight=commitment_weight,
            metric=metric,
            groups=groups,
            codebook_dim=codebook_dim,
            channel_dim=channel_dim,
            revive_below=revive_below,
            auto_update=auto_update,
            process_group=process_group,
        )
        if not 0.0 <= decay <= 1.0 or eps <= 0:
            raise ValueError(f"decay must lie in 0..1 and eps be positive, got {decay} and {eps}.")
        if rule not in RULES:
            raise ValueError(f"rule {rule!r} is not known; use one of {', '.join(RULES)}.")
        self.decay, self.eps, self.rule = decay, eps, rule
        self.register_buffer("codebook", self._initial_codebook())
        self._register_state()
        self.register_buffer("cluster_sum", self.codebook.clone())
        if rule == "debiased":
            self.cluster_size.zero_()
            self.cluster_sum.zero_()

    def _sums_shape(self) -> tuple[int, ...]:
        return tuple(self._grouped(self.codebook).shape)

    def _reset_state(self) -> None:
        super()._reset_state()
        self.cluster_sum.copy_(self.codebook)
        if self.rule == "debiased":
            self.cluster_size.zero_()
            self.cluster_sum.zero_()

    def _codebook_loss(self, codebook_loss: Tensor) -> Tensor:
        return torch.zeros_like(codebook_loss)

    def _lookup_codebook(self, rows: Tensor) -> Tensor:
        # Backward needs the codes as they were before the update that follows. The op keeps the rows that it wrote, which hold
        # them exactly unless z is narrower than the codebook.
        narrow = rows.dtype != self.codebook.dtype and self.training and torch.is_grad_enabled()
        return self.codebook.clone() if narrow else self.codebook

    def _learn(self, sums: Tensor, counts: Tensor) -> None:
        state = (self._grouped(t) for t in (self.codebook, self.cluster_size, self.cluster_sum))
        frozen = self._grouped(self.frozen) if self._any_frozen else None
        RULES[self.rule](*state, self.updates + 1, sums, counts, frozen, self.decay, self.eps)
        if self.metric == "cosine":
            # Normalising is not idempotent: what may not move is not normalised again.
            codebook, moves = self._grouped(self.codebook), (counts.sum(-1) > 0)[:, None] & ~self._grouped(self.frozen)
            codebook.copy_(torch.where(moves[..., None], nn.functional.normalize(codebook, dim=-1), codebook))

    def _revived(self, codebook: Tensor, replaced: Tensor, fresh: float) -> None:
        cluster_sum = self._grouped(self.cluster_sum)
        cluster_sum.copy_(torch.where(replaced[..., None], codebook * fresh, cluster_sum))
