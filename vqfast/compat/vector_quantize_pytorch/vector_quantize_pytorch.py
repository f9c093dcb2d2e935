"""`VectorQuantize` with the signature, results and state dict of vector_quantize_pytorch 1.32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from vqfast import _backends, _border
from vqfast.compat.vector_quantize_pytorch import _conditional, _layout, _plain
from vqfast.compat.vector_quantize_pytorch._checks import require
from vqfast.compat.vector_quantize_pytorch._codebook import Codebook, Found
from vqfast.compat.vector_quantize_pytorch._gradients import directional_reparam, l2norm, rotate_to, straight_through
from vqfast.compat.vector_quantize_pytorch._helpers import (
    accum_grad_,
    all_gather_sizes,
    all_gather_variably_sized,
    append_dims_to,
    at_most_one_of,
    batched_bincount,
    batched_sample_vectors,
    cdist,
    default,
    efficient_rotation_trick_transform,
    ema_inplace,
    entropy,
    exists,
    gumbel_sample,
    identity,
    is_distributed,
    is_empty,
    kmeans,
    laplace_smoothing,
    lens_to_mask,
    log,
    noop,
    orthogonal_loss_fn,
    pad_shape,
    safe_div,
    sample_multinomial,
    sample_vectors,
    sample_vectors_distributed,
    uniform_init,
)
from vqfast.compat.vector_quantize_pytorch._helpers import (
    chain as Sequential,
)
from vqfast.compat.vector_quantize_pytorch._helpers import (
    pack_with_inverse as pack_one,
)
from vqfast.compat.vector_quantize_pytorch._plain import gumbel_noise
from vqfast.nn._base import rerun_in_backward
from vqfast.ops.gather import gather

__all__ = [
    "Codebook",
    "LossBreakdown",
    "Sequential",
    "VectorQuantize",
    "accum_grad_",
    "all_gather_sizes",
    "all_gather_variably_sized",
    "append_dims_to",
    "at_most_one_of",
    "batched_bincount",
    "batched_sample_vectors",
    "cdist",
    "default",
    "directional_reparam",
    "efficient_rotation_trick_transform",
    "ema_inplace",
    "entropy",
    "exists",
    "gumbel_noise",
    "gumbel_sample",
    "identity",
    "is_distributed",
    "is_empty",
    "kmeans",
    "l2norm",
    "laplace_smoothing",
    "lens_to_mask",
    "log",
    "noop",
    "orthogonal_loss_fn",
    "pack_one",
    "pad_shape",
    "rotate_to",
    "safe_div",
    "sample_multinomial",
    "sample_vectors",
    "sample_vectors_distributed",
    "straight_through",
    "uniform_init",
]


@_border.exportable
class LossBreakdown(NamedTuple):
    """Terms of VectorQuantize's loss before their weights."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Vector quantization layer of vector_quantize_pytorch, over vqfast's search.

    The constructor's arguments, their defaults and their effects are those of the other library's class; where it fails or is
    wrong this one differs, as docs/COMPAT.md lists. The nearest code is the true one, found without the N x K matrix;
    `explain()` names the options that compare with every code, one chunk of rows at a time.

    State dict: `_codebook.{initted, cluster_size, embed_avg, embed}`, `project_in.*` and `project_out.*` with a projection.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        commitment_use_cross_entropy_loss: bool = False,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        codebook_diversity_loss_weight: float = 0.0,
        codebook_diversity_temperature: float = 100.0,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
        straight_through: bool = False,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        sync_affine_param: bool = False,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        in_place_codebook_optimizer: Callable[..., Optimizer] | None = None,
        manual_in_place_optimizer_update: bool = False,
        affine_param: bool = False,
        affine_param_batch_decay: float = 0.99,
        affine_param_codebook_decay: float = 0.9,
        sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
    ):
        super().__init__()
        learns_by_gradient = directional_reparam or vq_bridge is not None
        ema_update = not learns_by_gradient if ema_update is None else ema_update
        learnable_codebook = learns_by_gradient if learnable_codebook is None else learnable_codebook
        # One channel has no direction to rotate.
        rotation_trick = (not directional_reparam and dim > 1) if rotation_trick is None else rotation_trick
        require(
            straight_through + rotation_trick + directional_reparam <= 1,
            "straight_through, rotation_trick and directional_reparam exclude each other; rotation_trick is on by default, pass"
            " rotation_trick=False.",
        )
        require(
            not (directional_reparam and threshold_ema_dead_code == 0),
            "directional_reparam needs dead codes to be replaced; pass threshold_ema_dead_code > 0.",
        )
        require(not (use_cosine_sim and learnable_codebook), "use_cosine_sim does not go with a learnable codebook.")
        require(not (straight_through and learnable_codebook), "straight_through does not go with a learnable codebook.")
        require(not (ema_update and learnable_codebook), "a learnable codebook needs ema_update=False.")
        require(vq_bridge is None or learnable_codebook, "vq_bridge needs learnable_codebook=True.")
        require(not (use_cosine_sim and affine_param), "affine_param works with euclidean distance only.")
        require(0.0 <= sync_update_v <= 1.0, f"sync_update_v must lie in 0..1, got {sync_update_v}.")
        require(sync_update_v == 0 or learnable_codebook, "sync_update_v needs a learnable codebook.")
        require(not (accept_image_fmap and accept_3d_fmap), "choose one of accept_image_fmap and accept_3d_fmap.")

        self.dim, self.heads, self.separate_codebook_per_head = dim, heads, separate_codebook_per_head
        self.codebook_size, self.eps = codebook_size, eps
        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
        self.project_out = nn.Linear(inner, dim) if self.has_projections else nn.Identity()

        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.commitment_weight = commitment_weight
        self.commitment_use_cross_entropy_loss = commitment_use_cross_entropy_loss
        self.has_codebook_orthogonal_loss = orthogonal_reg_weight > 0
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.has_codebook_diversity_loss = codebook_diversity_loss_weight > 0
        self.codebook_diversity_loss_weight = codebook_diversity_loss_weight
        self.codebook_diversity_temperature = codebook_diversity_temperature
        self.learnable_codebook, self.use_cosine_sim = learnable_codebook, use_cosine_sim
        self.rotation_trick, self.directional_reparam = rotation_trick, directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.route_gradients_to_input, self.sync_update_v = route_gradients_to_input, sync_update_v
        self.accept_image_fmap, self.accept_3d_fmap, self.channel_last = accept_image_fmap, accept_3d_fmap, channel_last
        self.return_zeros_for_masked_padding, self.freeze_codebook = return_zeros_for_masked_padding, freeze_codebook
        self._codebook = Codebook(
            dim=codebook_dim,
            codebook_size=codebook_size,
            num_codebooks=heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            sync_kmeans=sync_kmeans,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_ddp=sync_codebook,
            learnable_codebook=self.has_codebook_orthogonal_loss or learnable_codebook,
            gumbel_sample=partial(gumbel_sample, stochastic=stochastic_sample_codes, straight_through=straight_through),
            sample_codebook_temp=sample_codebook_temp,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            affine_param=affine_param,
            sync_affine_param=sync_affine_param,
            affine_param_batch_decay=affine_param_batch_decay,
            affine_param_codebook_decay=affine_param_codebook_decay,
            use_cosine_sim=use_cosine_sim,
            vq_bridge=vq_bridge,
        )
        self.in_place_codebook_optimizer = None
        if in_place_codebook_optimizer is not None:
            self.in_place_codebook_optimizer = in_place_codebook_optimizer(self._codebook.parameters())
        self.manual_in_place_optimizer_update = manual_in_place_optimizer_update
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    # -- what users read and call --------------------------------------------------------------------------------------------

    @property
    def ema_update(self) -> bool:
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """The stored codes, [K, D]; [heads, K, D] with a codebook per head."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self._codebook.embed.data.copy_(codes if self.separate_codebook_per_head else codes[None])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes as the lookup compares with them, heads side by side, in the layer's layout; index -1 gives zeros."""
        return _layout.channels_back(self._codes_of(indices), self._like(indices), self._channel_first)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward returned for these indices: their codes after the output projection, in the layer's layout."""
        return _layout.channels_back(self.project_out(self._codes_of(indices)), self._like(indices), self._channel_first)

    def _codes_of(self, indices: Tensor) -> Tensor:
        codes = self._codebook.codes()
        if self.heads == 1:
            return gather(codes[0], indices)
        require(indices.shape[-1] == self.heads, f"indices are {list(indices.shape)}; the last axis must hold {self.heads} heads.")
        if not self.separate_codebook_per_head:
            return gather(codes[0], indices).flatten(-2)
        flat = indices.reshape(-1, self.heads).T
        return gather(codes, flat).transpose(0, 1).reshape(*indices.shape[:-1], -1)

    def _like(self, indices: Tensor) -> Tensor:
        """A tensor with as many axes as the input that gave these indices."""
        return indices if self.heads > 1 else indices[..., None]

    def maybe_split_heads_from_input(self, x: Tensor) -> Tensor:
        """x [b, n, heads * d] as [heads, b, n, d], or as [1, b * heads, n, d] where heads share a codebook; x itself with one head."""
        if self.heads == 1:
            return x
        x = x.unflatten(-1, (self.heads, -1)).movedim(-2, 0)
        return x if self.separate_codebook_per_head else x.transpose(0, 1).flatten(0, 1)[None]

    @torch.no_grad()
    def expire_codes_(self, x: Tensor) -> None:
        """Replace dead codes by rows of x [b, n, heads * d] (projected already); training only."""
        rows = _layout.rows_of(self._codebook.transform_input(x), self.heads, self.separate_codebook_per_head)
        self._codebook.expire_codes_(rows.transpose(0, 1))

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Learn from x, in the layer's layout, and the indices that it was given; what training does at the end of forward."""
        inner = self._channels_last(x)
        leading = tuple(inner.shape[:-1])
        mask = _layout.mask_of(x, leading, mask, None)
        indices = indices.reshape(*leading, self.heads)
        indices = indices if mask is None else indices.masked_fill(~mask[..., None], -1)
        rows = self._rows(self.project_in(inner))
        indices = _layout.rows_of(indices, self.heads, self.separate_codebook_per_head)
        self._codebook.relearn(rows, indices[..., 0])

    # for callers of the older name
    update_ema_indices = update_indices

    @torch.no_grad()
    def update_in_place_optimizer(self) -> None:
        """One step of the in-place codebook optimizer on the gradients there are, averaged over processes."""
        if self.in_place_codebook_optimizer is None:
            return
        for parameter in self._codebook.parameters() if self._codebook.use_ddp else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        self.in_place_codebook_optimizer.step()
        self.in_place_codebook_optimizer.zero_grad()

    def explain(self) -> str:
        """Say in words what runs this layer's search, and which of its options compare with every code."""
        codes = self._codebook.embed
        lines = [_backends.explain("quantize", codes)]
        plain = {
            "stochastic_sample_codes": self._codebook.stochastic,
            "codebook_diversity_loss_weight": self.has_codebook_diversity_loss,
            "commitment_use_cross_entropy_loss": self.commitment_use_cross_entropy_loss,
        }
        used = [name for name, on in plain.items() if on]
        if used:
            lines.append(f"plain torch, a chunk of {_plain.CHUNK_SCORES} scores at a time, in training: {', '.join(used)}")
        lines.append("plain torch in chunks, when a forward asks for it: topk=, indices=, codebook_transform_fn=")
        return "\n".join(lines)

    # -- layout ------------------------------------------------------------------------------------------------------------

    @property
    def _channel_first(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap

    def _channels_last(self, x: Tensor) -> Tensor:
        spatial = 2 if self.accept_image_fmap else 3 if self.accept_3d_fmap else None
        return _layout.channels_last(x, self.dim, channel_first=self._channel_first, spatial=spatial)

    def _rows(self, inner: Tensor) -> Tensor:
        return self._codebook.transform_input(_layout.rows_of(inner, self.heads, self.separate_codebook_per_head))

    def _unrows(self, rows: Tensor, leading: tuple[int, ...]) -> Tensor:
        return _layout.from_rows(rows, leading, self.heads, self.separate_codebook_per_head)

    # -- forward -----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        codebook_transform_fn: Callable | None = None,
        ema_update_weight: Tensor | Callable | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ):
        """Quantize x; in training also learn from it.

        **Shapes**: x [B, N, dim] or [B, dim]; [B, dim, N] with channel_last=False; [B, dim, H, W] and [B, dim, D, H, W] with
        accept_image_fmap and accept_3d_fmap. mask [B, N], or any first axes of x without the channels.

        Args:
            indices: int64 targets in the shape of the indices returned, -1 = ignore: return the cross entropy against them.
            mask: bool, True = valid; lens [B] says the same by lengths.
            topk: return the k nearest codes of each row, best first.
            sample_codebook_temp: temperature of stochastic_sample_codes, for this call.
            freeze_codebook, ema_update: override the layer's setting for this call.
            return_loss_breakdown: return a LossBreakdown, too.
            codebook_transform_fn: maps codes [C, K, D] to codes of each row [C, B, N, K, D].
            ema_update_weight: per code [K] or [C, K], or a function of (sums, counts): scales the step of the averages.
            accum_ema_update: keep this batch's statistics for the next forward that does not say so.

        Returns:
            (quantized like x, indices [B, ...] int64 with a last axis of heads or of k where there is one, loss []), then the
            breakdown; with topk in training the loss is per index. (quantized, cross entropy []) where indices are given.

        Raises:
            ValueError (also an AssertionError): x, mask or an option does not fit.
        """
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        topk = self._check_topk(topk)
        inner = self._channels_last(x)
        leading = tuple(inner.shape[:-1])
        mask = _layout.mask_of(x, leading, mask, lens)
        # Positions that are not finite are masked, too, where the search alone would not keep them apart.
        apart = topk is not None or indices is not None or codebook_transform_fn is not None or self._keeps_apart(inner)
        finite = _layout.finite_of(inner) if apart else None
        counts = finite if mask is None else mask if finite is None else mask & finite
        rows = self._rows(self.project_in(_layout.where_finite(inner, finite, 0.0)))
        valid = None if counts is None else _layout.rows_mask(counts, self.heads, self.separate_codebook_per_head)

        book, repeated = self._codebook, rerun_in_backward()
        if not repeated:
            book.prepare(rows.detach(), valid)
        temperature, soft = book.temperatures(sample_codebook_temp)
        if topk is not None or (x.requires_grad and self.route_gradients_to_input):
            soft = None  # nobody would see that gradient
        learns = self.training and not freeze and topk is None and not repeated

        def search(rows: Tensor) -> tuple[Tensor, Found]:
            codes = book.codes()
            # Backward needs the codes as they were before this forward moves them.
            codes = codes.clone() if learns else codes
            options = {"temperature": temperature, "topk": topk}
            if codebook_transform_fn is not None:
                return codes, _conditional.lookup(book, rows, codes, codebook_transform_fn, valid, **options)
            return codes, book.lookup(rows, codes, valid, with_sums=learns, soft=soft, **options)

        in_place = self.in_place_codebook_optimizer is not None and learns and torch.is_grad_enabled()
        in_place_loss = self.zero
        codes, found = search(rows.detach() if in_place else rows)
        if learns:
            book.learn(rows.detach(), found, weight=ema_update_weight, accumulate=accum_ema_update, ema_update=ema_update)
        if in_place:
            in_place_loss = self._optimize_in_place(found)
            codes, found = search(rows)

        quantized = self._route(rows, found, topk, x.requires_grad)
        output = self._output(quantized, inner, x, leading, mask, finite)
        if indices is not None:
            aims = indices.reshape(*leading, self.heads)
            aims = aims if finite is None else aims.masked_fill(~finite[..., None], -1)
            aims = _layout.rows_of(aims, self.heads, self.separate_codebook_per_head)
            return output, self._cross_entropy(rows, codes, aims[..., 0], codebook_transform_fn)

        loss, breakdown = self._losses(rows, codes, found, leading, freeze, topk, codebook_transform_fn, finite)
        breakdown = breakdown._replace(inplace_optimize=in_place_loss)
        chosen = self._unrows(found.indices, leading)
        if finite is not None:
            chosen = chosen.masked_fill(_layout.over(~finite if mask is None else ~finite & mask, chosen), 0)
        result = (output, chosen, loss)
        return (*result, breakdown) if return_loss_breakdown else result

    def _keeps_apart(self, inner: Tensor) -> bool:
        """Whether an option of this layer compares, learns or differentiates where the search alone leaves rows out."""
        book = self._codebook
        compares = book.stochastic or book.straight_through or self.has_codebook_diversity_loss
        compares = compares or self.commitment_use_cross_entropy_loss or self.directional_reparam
        differentiates = self.has_projections or (self.use_cosine_sim and inner.requires_grad)
        return book.learnable_codebook or (self.training and compares) or (torch.is_grad_enabled() and differentiates)

    def _check_topk(self, topk: int | None) -> int | None:
        if topk is None:
            return None
        alone = not self.training or not (self.commitment_use_cross_entropy_loss or self.in_place_codebook_optimizer is not None)
        require(
            self.heads == 1 and topk > 0 and alone,
            f"topk={topk} needs one head, a positive number, and in training neither the cross-entropy commitment loss nor an"
            " in-place codebook optimizer.",
        )
        return min(int(topk), self.codebook_size)

    def _optimize_in_place(self, found: Found) -> Tensor:
        with torch.enable_grad():
            loss = (found.sq_error[1] / self._elements(found)).to(torch.float32)
        loss.backward()
        if not self.manual_in_place_optimizer_update:
            self.update_in_place_optimizer()
        return loss

    @staticmethod
    def _elements(found: Found) -> Tensor:
        """Values that the squared error sums over: valid rows of all codebooks times D."""
        return found.counts.sum().clamp(min=1) * found.quantized.shape[-1]

    def _route(self, rows: Tensor, found: Found, topk: int | None, to_input: bool) -> Tensor:
        """The codes with the gradient that this layer gives to its input, [B, C, N, (k,) D]."""
        quantized = found.quantized.to(rows.dtype)
        if not self.training:
            return quantized
        rows = rows if topk is None else rows[..., None, :].expand_as(quantized)
        if to_input and self.route_gradients_to_input:
            if self.rotation_trick:
                quantized = rotate_to(rows, quantized)
            elif self.directional_reparam:
                # Codebooks first, as in the other library, so that the noise is the same.
                start, goal = rows.transpose(0, 1), quantized.transpose(0, 1).contiguous()
                quantized = directional_reparam(start, goal, self.directional_reparam_variance).transpose(0, 1)
            else:
                quantized = straight_through(rows, quantized)
        if self.sync_update_v > 0:
            quantized = quantized + self.sync_update_v * (quantized - quantized.detach())
        return quantized

    def _output(self, quantized, inner, x, leading, mask, finite) -> Tensor:
        """Join heads, project, mark what is not finite, blank what is masked, and return to x's layout and dtype."""
        out = self._unrows(quantized, leading)
        out = self.project_out(out if self.heads == 1 else out.flatten(-2)).to(x.dtype)
        if finite is not None:
            out = torch.where(_layout.over(finite, out), out, torch.nan)
        if mask is not None:
            blank = torch.zeros_like(inner) if self.return_zeros_for_masked_padding else inner
            blank = blank if out.dim() == inner.dim() else blank[..., None, :]
            out = torch.where(_layout.over(mask, out), out, blank)
        return _layout.channels_back(out, x, self._channel_first)

    def _losses(self, rows, codes, found, leading, freeze, topk, transform, finite) -> tuple[Tensor, LossBreakdown]:
        zero = self.zero.to(torch.promote_types(self.zero.dtype, torch.float32), copy=True)
        if not self.training and topk is None:
            return zero, LossBreakdown(zero, zero, zero, zero)
        commitment = diversity = orthogonal = zero
        if topk is not None and (self.has_commitment_loss or not self.training):
            commitment = self._unrows(self._commitment_of_each(rows, found, freeze), leading)
            loss = commitment * (self.commitment_weight if self.has_commitment_loss else 1.0)
        elif self.has_commitment_loss and self.commitment_use_cross_entropy_loss:
            commitment = self._cross_entropy(rows, codes, found.indices, transform)
            loss = commitment * self.commitment_weight
        elif self.has_commitment_loss:
            commitment = self._commitment(rows, found, freeze)
            loss = commitment * self.commitment_weight
        else:
            loss = zero
        if self.training and self.has_codebook_diversity_loss:
            diversity = self._diversity(rows, codes, leading, transform, finite)
            loss = loss + diversity * self.codebook_diversity_loss_weight
        if self.training and self.has_codebook_orthogonal_loss:
            orthogonal = self._orthogonal(found)
            loss = loss + orthogonal * self.orthogonal_reg_weight
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not loss.requires_grad:
            loss = loss.clone().requires_grad_()  # so that loss.backward() works whatever the options
        return loss, LossBreakdown(commitment, diversity, orthogonal, zero)

    def _cross_entropy(self, rows: Tensor, codes: Tensor, aims: Tensor, transform) -> Tensor:
        if transform is None:
            return _plain.cross_entropy(rows, codes, aims, self.use_cosine_sim)
        return _conditional.cross_entropy(self._codebook, rows, codes, transform, aims)

    def _diversity(self, rows: Tensor, codes: Tensor, leading: tuple[int, ...], transform, finite: Tensor | None) -> Tensor:
        """Of all rows that are finite; masked ones count, as in the other library."""
        heads, temperature = (self.heads, self.separate_codebook_per_head), self.codebook_diversity_temperature
        positions, counts = _layout.by_position(rows, leading, *heads), None
        if finite is not None:
            counts = _layout.rows_mask(finite, *heads)[:, None, :, None].expand(*rows.shape[:3], 1)
            counts = _layout.by_position(counts, leading, *heads)[..., 0]
        if transform is None:
            return _plain.diversity(positions, codes, self.use_cosine_sim, temperature, counts)
        return _conditional.diversity(self._codebook, positions, codes, transform, temperature, counts)

    def _commitment(self, rows: Tensor, found: Found, freeze: bool) -> Tensor:
        """Mean squared error; its gradient reaches the codes, too, where they are learnable and not frozen."""
        error = found.sq_error[0]
        if self.learnable_codebook and not freeze:
            error = error + (found.sq_error[1] - found.sq_error[1].detach())
        return (error / self._elements(found)).to(torch.promote_types(rows.dtype, torch.float32))

    def _commitment_of_each(self, rows: Tensor, found: Found, freeze: bool) -> Tensor:
        """Mean squared error per row and code, [B, ..., k]; 0 where masked."""
        to_codes = not self.training or (self.learnable_codebook and not freeze)
        codes = found.quantized if to_codes else found.quantized.detach()
        work = torch.promote_types(rows.dtype, torch.float32)
        error = (codes.to(work) - rows[..., None, :].to(work)).square().mean(-1)
        return torch.where(found.indices >= 0, error, 0)

    def _orthogonal(self, found: Found) -> Tensor:
        codes = self._codebook.embed.clone()  # as they are now: the averages may move them before backward
        if self.orthogonal_reg_active_codes_only:
            require(
                self.heads == 1 or not self.separate_codebook_per_head,
                "orthogonal_reg_active_codes_only does not go with a codebook per head.",
            )
            codes = codes[:, found.indices[found.indices >= 0].unique()]
        if self.orthogonal_reg_max_codes is not None and codes.shape[1] > self.orthogonal_reg_max_codes:
            codes = codes[:, torch.randperm(codes.shape[1], device=codes.device)[: self.orthogonal_reg_max_codes]]
        return _plain.orthogonality(codes)
