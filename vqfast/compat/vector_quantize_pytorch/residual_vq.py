"""`ResidualVQ` and `GroupedResidualVQ` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.compat.vector_quantize_pytorch import _layout
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._conditional import RowCodes
from vqfast.compat.vector_quantize_pytorch._gradients import l2norm
from vqfast.compat.vector_quantize_pytorch._helpers import (  # noqa: F401
    batch_select,
    cast_tuple,
    default,
    exists,
    first,
    frac_gradient,
    is_distributed,
    pad_at_dim,
    round_up_multiple,
    unique,
)
from vqfast.compat.vector_quantize_pytorch._helpers import pack_with_inverse as pack_one  # noqa: F401
from vqfast.compat.vector_quantize_pytorch._residual import Grouped, Residual
from vqfast.compat.vector_quantize_pytorch._residual import sync_seed as get_maybe_sync_seed  # noqa: F401
from vqfast.compat.vector_quantize_pytorch.vector_quantize_pytorch import VectorQuantize, directional_reparam
from vqfast.ops import residual
from vqfast.ops.gather import gather


class MLP(nn.Module):
    """Network that turns a level's codes into codes for one row, given what the levels before quantized.

    Source: Huijben et al. 2024 (QINCo, arXiv 2401.14732).
    """

    def __init__(self, dim: int, dim_hidden: int | None = None, depth: int = 4, l2norm_output: bool = False):
        super().__init__()
        hidden = dim if dim_hidden is None else dim_hidden
        self.proj_in = nn.Linear(2 * dim, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(depth)
        )
        self.l2norm_output = l2norm_output

    def rows(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Codes [..., D] under conditions [..., D], one each."""
        x = self.proj_in(torch.cat((condition, codes), -1))
        for layer in self.layers:
            x = layer(x) + x
        return F.normalize(x, dim=-1) if self.l2norm_output else x

    def forward(self, codes: Tensor, *, condition: Tensor) -> Tensor:
        """All codes of all rows: codes [K, D] or [C, K, D], condition [B, ..., D] -> [B, N, K, D] or [C, B, N, K, D]."""
        condition = condition[:, None] if condition.dim() == 2 else condition.flatten(1, -2)
        codes = codes[..., None, None, :, :]
        shape = (*codes.shape[:-4], *condition.shape[:2], *codes.shape[-2:])
        return self.rows(codes.expand(shape), condition[:, :, None].expand(shape))


class _Beams(NamedTuple):
    """The best chains of codes so far; J of them for every row."""

    scores: Tensor  # [..., J], larger is better
    residual: Tensor  # [..., J, D]
    quantized: Tensor  # [..., J, D]
    indices: Tensor  # [..., J, L]
    losses: Tensor  # [..., J, L]
    inputs: Tensor  # [..., J, L, D], what each level quantized; L = 0 where nobody asks

    def take(self, picked: Tensor) -> _Beams:
        """The beams of indices [..., J']."""
        depth = picked.dim() - 1

        def of(t: Tensor) -> Tensor:
            index = picked.view(*picked.shape, *(1,) * (t.dim() - depth - 1))
            return t.gather(depth, index.expand(*picked.shape, *t.shape[depth + 1 :]))

        return _Beams(*map(of, self))


class ResidualVQ(Residual):
    """Residual vector quantization of vector_quantize_pytorch, over vqfast's search.

    Level q quantizes what levels before it left over. As in the other library every level passes the gradient straight
    through (or rotated), so that d quantized / d x is num_quantizers times the identity; vqfast's own
    ResidualVectorQuantizer gives the identity.

    State dict: `layers.{q}._codebook.*`, `project_in.*` and `project_out.*` with a projection, `mlps.*` with an implicit
    neural codebook. Differences: docs/COMPAT.md.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        implicit_neural_codebook: bool = False,
        mlp_kwargs: dict | None = None,
        beam_size: int | None = None,
        eval_beam_size: int | None = None,
        beam_score_quantizer_weights: Sequence[float] | None = None,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **vq_kwargs,
    ):
        super().__init__()
        require(heads == 1, "ResidualVQ has one head.")
        require(num_quantizers is not None or isinstance(codebook_size, tuple), "pass num_quantizers, or codebook_size as a tuple.")
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,) * num_quantizers
        self.num_quantizers = len(sizes) if num_quantizers is None else num_quantizers
        require(len(sizes) == self.num_quantizers, f"codebook_size has {len(sizes)} entries for {self.num_quantizers} levels.")
        require(eval_beam_size is None or beam_size is not None, "eval_beam_size needs beam_size.")
        require(not shared_codebook or len(set(sizes)) == 1, "a shared codebook needs equal codebook sizes.")
        self.codebook_sizes, self.uniform_codebook_size = sizes, len(set(sizes)) == 1
        self.dim, self.codebook_dim = dim, dim if codebook_dim is None else codebook_dim
        self.has_projections = self.codebook_dim != dim
        self.project_in = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, vq_kwargs.pop("accept_3d_fmap", False)
        self.channel_last = vq_kwargs.pop("channel_last", True)
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.shared_codebook, self.diveq, self.implicit_neural_codebook = shared_codebook, diveq, implicit_neural_codebook
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.beam_size, self.eval_beam_size = beam_size, beam_size if eval_beam_size is None else eval_beam_size

        vq_kwargs["return_zeros_for_masked_padding"] = return_zeros_for_masked_padding
        if implicit_neural_codebook:
            vq_kwargs.update(learnable_codebook=True, ema_update=False)
        if shared_codebook:
            vq_kwargs.update(manual_ema_update=True, manual_in_place_optimizer_update=True)
        if diveq:
            vq_kwargs.update(ema_update=False, learnable_codebook=True, route_gradients_to_input=False, commitment_weight=0.0)
        self.layers = nn.ModuleList(
            VectorQuantize(dim=self.codebook_dim, codebook_size=size, codebook_dim=self.codebook_dim, **vq_kwargs)
            for size in sizes
        )
        self._set_dropout(quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of)
        self.vq_is_ema_updating = self.layers[0].ema_update

        weights = [1.0] * self.num_quantizers if beam_score_quantizer_weights is None else list(beam_score_quantizer_weights)
        require(len(weights) == self.num_quantizers, f"beam_score_quantizer_weights has {len(weights)} entries.")
        self.register_buffer("beam_score_weights", torch.tensor(weights), persistent=False)
        self.mlps = (None,) * (self.num_quantizers - 1)
        if implicit_neural_codebook:
            options = {"dim": self.codebook_dim, "l2norm_output": self.layers[0].use_cosine_sim, **(mlp_kwargs or {})}
            self.mlps = nn.ModuleList(MLP(**options) for _ in range(self.num_quantizers - 1))
        if shared_codebook:
            for layer in self.layers[1:]:
                layer._codebook = self.layers[0]._codebook

    # -- what users read and call --------------------------------------------------------------------------------------------

    @property
    def codebook_size(self) -> int:
        """Codes of the first level."""
        return self.layers[0].codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The stored codes [Q, K, D]; a tuple of [K, D] where sizes differ."""
        codebooks = tuple(layer.codebook for layer in self.layers)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def _decode_levels(self, indices: tuple[Tensor, ...]) -> list[Tensor]:
        codes, total = [], 0.0
        for level, own in enumerate(indices):
            layer, mlp = self.layers[level], self.mlps[level - 1] if level else None
            picked = gather(layer._codebook.codes()[0], own)
            if mlp is not None:
                out = mlp.rows(picked, total)
                out = l2norm(out) if layer.use_cosine_sim else out
                picked = torch.where((own >= 0)[..., None], out, 0)
            codes.append(picked)
            total = total + picked
        return codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward returned for indices [B, ..., Q], in the layer's layout."""
        return _layout.channels_back(super().get_output_from_indices(indices), indices, self._channel_first)

    def explain(self) -> str:
        """Say in words what runs the search of the first level, and which options compare with every code."""
        lines = [self.layers[0].explain()]
        if self.implicit_neural_codebook:
            lines.append("plain torch in chunks of rows: implicit_neural_codebook, whose network makes K codes for every row")
        if (self.beam_size or 1) > 1:
            lines.append("plain torch in chunks: the k nearest codes of beam search")
        return "\n".join(lines)

    # -- forward -----------------------------------------------------------------------------------------------------------

    @property
    def _channel_first(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ):
        """Quantize x by all levels; in training also learn from it.

        **Shapes**: x [B, N, dim] or [B, dim]; [B, dim, H, W] with accept_image_fmap. mask: the first axes of x, True = valid.

        Args:
            indices: targets [B, ..., Q] (or a list of Q): return the sum of the levels' cross entropies against them.
            return_all_codes: return the codes of every level, too, [Q, B, ..., codebook_dim].
            sample_codebook_temp, freeze_codebook: see `VectorQuantize`.
            beam_size: chains of codes kept per row; overrides the layer's.
            rand_quantize_dropout_fixed_seed: of the draw of how many levels run.

        Returns:
            (quantized like x, indices [B, ..., Q] int64, losses [Q]) and the codes; (quantized, cross entropy []) with indices.
            Levels that dropout left out hold index -1 and loss 0.
        """
        spatial = 2 if self.accept_image_fmap else 3 if self.accept_3d_fmap else None
        original = _layout.channels_last(x, self.dim, channel_first=self._channel_first, spatial=spatial)
        leading = tuple(original.shape[:-1])
        mask = _layout.mask_of(x, leading, mask, None)
        # The levels keep rows apart that are not finite; no gradient of what stands around them may meet one.
        meets = torch.is_grad_enabled() and (self.has_projections or self.diveq)
        finite = _layout.finite_of(original) if meets else None
        inner = self.project_in(_layout.where_finite(original, finite, 0.0))
        inner = _layout.where_finite(inner, finite, torch.nan)
        beam_size = (self.beam_size if self.training else self.eval_beam_size) if beam_size is None else beam_size
        call = {"mask": mask, "sample_codebook_temp": sample_codebook_temp, "freeze_codebook": freeze_codebook}
        if indices is not None:
            return self._cross_entropy(x, inner, original, indices, call, finite)
        levels = self._levels(x.device, rand_quantize_dropout_fixed_seed)
        if beam_size is not None and beam_size > 1:
            quantized, found, losses, inputs = self._beam_search(inner, levels, beam_size, call)
        elif self._fuses(inner):
            quantized, found, losses, inputs = self._fused(inner, mask)
        else:
            quantized, found, losses, inputs = self._greedy(inner, levels, call)
        self._learn_shared(inputs, mask, freeze_codebook)
        found = self._stacked(found)
        losses = losses if isinstance(losses, Tensor) else self._stacked(losses, 0)
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        result = (self._output(x, inner, original, quantized, mask, finite), found, losses)
        return (*result, self.get_codes_from_indices(found)) if return_all_codes else result

    def _output(self, x, inner, original, quantized, mask: Tensor | None, finite: Tensor | None) -> Tensor:
        inner, quantized = (_layout.where_finite(t, finite, 0.0) for t in (inner, quantized))
        out = self.project_out(directional_reparam(inner, quantized) if self.diveq else quantized)
        out = _layout.where_finite(out, finite, torch.nan)
        if mask is not None:
            out = torch.where(mask[..., None], out, torch.zeros_like(out) if self.return_zeros_for_masked_padding else original)
        return _layout.channels_back(out.to(x.dtype), x, self._channel_first)

    def _transform(self, level: int, quantized: Tensor) -> RowCodes | None:
        mlp = self.mlps[level - 1] if level else None
        return None if mlp is None else RowCodes(mlp.rows, quantized)

    def _greedy(self, inner: Tensor, levels: int, call: dict) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        """Each level takes the nearest code: (their sum, indices, losses, what each level was given)."""
        rest, total = inner, torch.zeros_like(inner)
        found, losses, inputs = [], [], []
        for level, layer in enumerate(self.layers[:levels]):
            inputs.append(rest)
            quantized, own, loss = layer(rest, codebook_transform_fn=self._transform(level, total), **call)
            rest = rest - frac_gradient(quantized, self.quant_grad_frac)
            total = total + quantized
            found.append(own)
            losses.append(loss)
        return total, found, losses, inputs

    def _fuses(self, inner: Tensor) -> bool:
        """Whether one op may run all levels: in eval, where no level does more than take its nearest code.

        Not in half precision: the op keeps what is left over in float32, which training and the other library round.
        """
        books = [layer._codebook for layer in self.layers]
        plain = self.uniform_codebook_size and inner.dtype in (torch.float32, torch.float64)
        plain = plain and not (self.training or self.implicit_neural_codebook or self.layers[0].use_cosine_sim)
        ready = plain and not any(book._may_need_init for book in books)
        return ready and not (torch.is_grad_enabled() and any(book.embed.requires_grad for book in books))

    def _fused(self, inner: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        # Losses as one tensor: Inductor cannot stack constants.
        codebooks = torch.stack([layer._codebook.codes() for layer in self.layers])  # [Q, 1, K, D]
        rows = _layout.rows_of(inner.detach(), 1, False)
        valid = None if mask is None else mask.reshape(rows.shape[0], rows.shape[2])
        step = residual.step(rows, codebooks, valid)
        leading = inner.shape[:-1]
        found = [own.reshape(leading) for own in step.indices]
        losses = torch.zeros(len(found), dtype=self.layers[0].zero.dtype, device=inner.device)
        return step.quantized.reshape(inner.shape), found, losses, []

    def _cross_entropy(self, x, inner, original, indices, call: dict, finite: Tensor | None) -> tuple[Tensor, Tensor]:
        indices = torch.stack(indices) if isinstance(indices, list) else indices
        require(
            indices.shape[-1] == self.num_quantizers and not bool((indices == -1).any()),
            "indices must hold every level, none dropped (-1); take them from a forward in eval mode.",
        )
        rest, total, entropy = inner, torch.zeros_like(inner), 0.0
        for level, layer in enumerate(self.layers):
            transform = self._transform(level, total)
            quantized, own = layer(rest, indices=indices[..., level], codebook_transform_fn=transform, **call)
            rest = rest - frac_gradient(quantized, self.quant_grad_frac)
            total, entropy = total + quantized, entropy + own
        return self._output(x, inner, original, total, call["mask"], finite), entropy

    @torch.no_grad()
    def _learn_shared(self, inputs: list[Tensor], mask: Tensor | None, freeze: bool | None) -> None:
        """One codebook for all levels moves once, after the last."""
        layer = self.layers[0]
        freeze = layer.freeze_codebook if freeze is None else freeze
        if not (self.training and self.shared_codebook) or freeze:
            return
        if self.vq_is_ema_updating:
            layer._codebook.update_ema()
        layer.update_in_place_optimizer()
        if layer._codebook.has_dead_code_replacement:
            rows = torch.stack([t.detach().flatten(0, -2) for t in inputs], -2).flatten(0, 1)  # levels of a row side by side
            valid = None if mask is None else mask.reshape(-1).repeat_interleave(len(inputs))
            layer._codebook.expire_codes_(layer._codebook.transform_input(rows)[None], valid)

    # -- beam search -------------------------------------------------------------------------------------------------------

    def _beam_search(self, inner: Tensor, levels: int, width: int, call: dict):
        """Keep the `width` chains of codes with the smallest sum of losses; results as of `_greedy`, of the best chain."""
        empty = inner.new_zeros(*inner.shape[:-1], 1, 0)
        beams = _Beams(
            inner.new_zeros(*inner.shape[:-1], 1),
            inner[..., None, :],
            torch.zeros_like(inner)[..., None, :],
            empty.long(),
            empty.float(),
            empty[..., None].expand(*empty.shape, inner.shape[-1]),
        )
        for level in range(levels):
            beams = self._extended(beams, level, width, call)
            kept = 1 if level == levels - 1 else width
            if beams.scores.shape[-1] > kept:
                beams = beams.take(beams.scores.topk(kept, dim=-1).indices)
        best = _Beams(*(t.select(inner.dim() - 1, 0) for t in beams))
        found, inputs, mask = list(best.indices.unbind(-1)), list(best.inputs.unbind(-2)), call["mask"]
        valid = inner.detach().isfinite().all(-1)
        valid = valid if mask is None else valid & mask
        losses = torch.where(valid[..., None], best.losses, 0).flatten(0, -2).sum(0) / valid.sum().clamp(min=1)
        freeze = call["freeze_codebook"]
        if self.training and not (self.layers[0].freeze_codebook if freeze is None else freeze):
            for layer, own, index in zip(self.layers, inputs, found, strict=False):  # dropout may have left levels out
                layer.update_indices(own, index, mask=mask)
        return best.quantized, found, list(losses.unbind(-1)), inputs

    def _extended(self, beams: _Beams, level: int, width: int, call: dict) -> _Beams:
        """Every beam with each of its `width` nearest codes: J beams become J * k."""
        given = beams.residual
        transform = self._transform(level, beams.quantized)
        quantized, own, loss = self.layers[level](given, topk=width, codebook_transform_fn=transform, **call)
        if loss.dim() == 0:  # a layer without commitment loss in training
            error = quantized.detach() - given[..., None, :]
            loss = _layout.where_finite(error, _layout.finite_of(error), 0.0).square().mean(-1)
        inputs = torch.cat((beams.inputs, given[..., None, :].to(beams.inputs.dtype)), -2) if self.training else beams.inputs

        def joined(t: Tensor) -> Tensor:  # [..., J, k, *] -> [..., J * k, *]
            return t.flatten(given.dim() - 2, given.dim() - 1)

        def repeated(t: Tensor) -> Tensor:  # [..., J, *] -> [..., J, k, *]
            return t.unsqueeze(given.dim() - 1).expand(*t.shape[: given.dim() - 1], own.shape[-1], *t.shape[given.dim() - 1 :])

        return _Beams(
            joined(beams.scores[..., None] - loss * self.beam_score_weights[level]),
            joined(given[..., None, :] - frac_gradient(quantized, self.quant_grad_frac)),
            joined(beams.quantized[..., None, :] + quantized),
            joined(torch.cat((repeated(beams.indices), own[..., None]), -1)),
            joined(torch.cat((repeated(beams.losses), loss[..., None]), -1)),
            joined(repeated(inputs)),
        )


class GroupedResidualVQ(Grouped):
    """ResidualVQ layers side by side, each on its share of the channels; state dict `rvqs.{g}.*`."""

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs):
        super().__init__(ResidualVQ, dim, groups, accept_image_fmap, accept_image_fmap=accept_image_fmap, **kwargs)

    def forward(
        self,
        x: Tensor,
        indices: Sequence[Tensor] | Tensor | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        mask: Tensor | None = None,
    ):
        """Quantize x [B, N, dim], or [B, dim, H, W] with accept_image_fmap; arguments as of `ResidualVQ`, indices [G, B, ..., Q].

        Returns:
            (quantized like x, indices [G, B, ..., Q], losses [G, Q]) and a tuple of G with the codes; (quantized, cross entropy
            []) with indices.
        """
        call = {"sample_codebook_temp": sample_codebook_temp, "freeze_codebook": freeze_codebook, "mask": mask}
        if indices is not None and len(indices):
            require(len(indices) == self.groups, f"indices hold {len(indices)} groups, this layer has {self.groups}.")
            quantized, (entropies,) = self._each(x, [{"indices": own} for own in indices], **call)
            return quantized, sum(entropies)
        quantized, (found, losses, *codes) = self._each(x, return_all_codes=return_all_codes, **call)
        return (quantized, torch.stack(found), torch.stack(losses), *codes)
