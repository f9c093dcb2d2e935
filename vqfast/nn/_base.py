"""What all quantizer layers share: layout, projections, codebook access, state dtype, freezing."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vqfast.nn import _layout
from vqfast.nn._distributed import all_gather_rows
from vqfast.nn._hints import HintKeeper
from vqfast.ops import _shapes
from vqfast.ops.gather import gather
from vqfast.ops.kmeans import kmeans
from vqfast.ops.nearest import search
from vqfast.ops.quantize import check_mask
from vqfast.ops.straight_through import all_finite

_HALVES = (torch.float16, torch.bfloat16)


class WideState(nn.Module):
    """A module whose codebook and statistics are float32 or float64, whatever the default dtype, and stay so under .half(), .bfloat16(),
    .to(dtype) and load_state_dict(assign=True).
    """

    # Names of the parameters and buffers that do; a layer need not have them all.
    _wide_state: tuple[str, ...] = ()

    def register_buffer(self, name, tensor, persistent=True):
        super().register_buffer(name, self._widened(name, tensor), persistent)

    def register_parameter(self, name, param):
        wide = self._widened(name, param)
        super().register_parameter(name, param if wide is param else nn.Parameter(wide.detach(), param.requires_grad))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        given = {name: tensor for name in self._wide_state if isinstance(tensor := state_dict.get(prefix + name), Tensor)}
        wide = {prefix + name: self._widened(name, tensor) for name, tensor in given.items() if tensor.dtype in _HALVES}
        super()._load_from_state_dict({**state_dict, **wide} if wide else state_dict, prefix, *args)

    def _widened(self, name: str, tensor: Tensor | None) -> Tensor | None:
        narrow = name in self._wide_state and isinstance(tensor, Tensor) and tensor.dtype in _HALVES
        return tensor.to(torch.float32) if narrow else tensor

    def _apply(self, fn, recurse=True):
        wide = {name: tensor for name in self._wide_state if (tensor := getattr(self, name, None)) is not None}
        kept = {name: (tensor.detach(), None if tensor.grad is None else tensor.grad.detach()) for name, tensor in wide.items()}
        super()._apply(fn, recurse)
        for name, (before, grad) in kept.items():
            after = getattr(self, name)
            if after.dtype in _HALVES:
                after.data = before.to(after.device)
                after.grad = grad if grad is None else grad.to(after.device)
        return self


class QuantizerBase(WideState):
    """Layout, projection and codebook handling; subclasses decide how the codebook learns.

    The codebook is stored as [K, D], or [S, K, D] with several groups or levels, in float32 (or float64); half-precision moves
    of the module leave it there.
    """

    _wide_state: tuple[str, ...] = ("codebook",)

    def __init__(self, dim, codebook_size, *, metric, groups, codebook_dim, channel_dim, process_group):
        super().__init__()
        sizes = {"dim": dim, "codebook_size": codebook_size, "groups": groups}
        for name, value in (sizes | ({} if codebook_dim is None else {"codebook_dim": codebook_dim})).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if not isinstance(channel_dim, int) or isinstance(channel_dim, bool):
            raise ValueError(f"channel_dim must be the integer of an axis, got {channel_dim!r}.")
        self.metric_code = _shapes.check_metric(metric)
        self.dim, self.codebook_size, self.groups, self.metric = dim, codebook_size, groups, metric
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        if self.codebook_dim % groups:
            raise ValueError(f"{self.codebook_dim} channels do not split into groups={groups}; choose a divisor.")
        self.channel_dim = channel_dim
        self.process_group = process_group
        self._hints = HintKeeper()
        self.project_in = nn.Linear(dim, self.codebook_dim) if self._projects else nn.Identity()
        self.project_out = nn.Linear(self.codebook_dim, dim) if self._projects else nn.Identity()

    # -- codebook --------------------------------------------------------------------------------------------------------

    def _stored_shape(self) -> tuple[int, ...]:
        """Shape of the codebook parameter or buffer."""
        plain = (self.codebook_size, self.codebook_dim // self.groups)
        return plain if self.groups == 1 else (self.groups, *plain)

    def _initial_codebook(self) -> Tensor:
        # Uniform with variance 1 / D (Sonnet's variance scaling), so that a code has norm about 1.
        shape = self._stored_shape()
        limit = math.sqrt(3.0 / shape[-1])
        codebook = torch.empty(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)).uniform_(-limit, limit)
        return nn.functional.normalize(codebook, dim=-1) if self.metric == "cosine" else codebook

    def _codes(self) -> Tensor:
        """The codes that a lookup sees, in the shape of the stored codebook."""
        return self.codebook

    def _grouped(self, tensor: Tensor) -> Tensor:
        """A stored tensor [K, ...] or [S, K, ...] as [S, K, ...]."""
        return tensor if len(self._stored_shape()) == 3 else tensor[None]

    @torch.no_grad()
    def set_codebook_(self, codebook: Tensor) -> None:
        """Replace the codebook and reset what was learned about it (sizes, sums, pending statistics).

        Args:
            codebook: same shape as `self.codebook`, floating, finite.

        Raises:
            ValueError, TypeError: shape or dtype do not fit, or a value is not finite.
        """
        _shapes.check_float("codebook", codebook)
        if codebook.shape != self.codebook.shape:
            raise ValueError(f"codebook is {_shapes.describe(codebook)}, this layer's is {_shapes.describe(self.codebook)}.")
        if not bool(codebook.isfinite().all()):
            raise ValueError("codebook holds NaN or Inf; every code must be finite.")
        if self.metric == "cosine":
            codebook = nn.functional.normalize(codebook.to(self.codebook.dtype), dim=-1)
        self.codebook.copy_(codebook)
        self._reset_state()

    @torch.no_grad()
    def init_codebook_(self, batch: Tensor, *, iterations: int = 10, seed: int = 0) -> None:
        """Set the codebook by k-means on the rows of a batch of this layer's inputs (all processes' rows, the same result on each).

        Args:
            batch: layer input, as for forward; it needs at least codebook_size finite rows per group.
            iterations: Lloyd steps. seed: of the starting draw.
        """
        rows = self._rows(batch)[0].transpose(0, 1).flatten(1, 2).to(torch.float32)  # [G, N, D]
        self.set_codebook_(self._codes_from_rows(rows, iterations, seed))

    def _codes_from_rows(self, rows: Tensor, iterations: int, seed: int) -> Tensor:
        codes = [
            kmeans(all_gather_rows(group.contiguous(), self.process_group), self.codebook_size, iterations=iterations, seed=seed)
            for group in rows
        ]
        return torch.stack([result.codebook for result in codes]).reshape(self._stored_shape())

    def _reset_state(self) -> None:
        """Forget statistics that belong to an old codebook."""

    # -- layout ----------------------------------------------------------------------------------------------------------

    @property
    def _projects(self) -> bool:
        return self.codebook_dim != self.dim

    def _rows(self, z: Tensor, mask: Tensor | None = None) -> tuple[Tensor, tuple[int, ...]]:
        """z -> canonical rows [B, G, N, D] and z's shape without the channel axis. mask: z's shape without that axis."""
        _layout.check_channels(z, self.dim, self.channel_dim)
        like = _layout.without_channel(z.shape, self.channel_dim)
        check_mask(mask, z, like)
        z = z.movedim(self.channel_dim, -1)
        if self._projects:
            z = _where_it_counts(self.project_in, z, None if mask is None else mask[..., None])
        rows = _layout.to_rows(z, -1, self.groups)
        if self.metric == "cosine":
            rows = _where_it_counts(_normalized, rows, None if mask is None else mask_rows(mask)[:, None, :, None])
        return rows, like

    def _to_layout(self, rows: Tensor, like: tuple[int, ...], mask: Tensor | None = None) -> Tensor:
        z = _layout.from_rows(rows, like, -1)
        if self._projects:
            valid = None if mask is None else mask[..., None]
            z = _where_it_counts(self.project_out, z, valid)
            z = z if valid is None else torch.where(valid, z, 0)
        return z.movedim(-1, self.channel_dim)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Indices of the nearest codes: int64, z's shape without the channel axis ([B, G, ...] with several groups)."""
        rows, like = self._rows(z)
        codebook = self._grouped(self._codes())
        indices = search(rows, codebook, self.metric_code, self._hints.of(rows, codebook, self.metric_code)).indices
        return _layout.indices_to_user(indices, like)

    def decode(self, indices: Tensor) -> Tensor:
        """Codes of indices as the layer's output layout; index -1 gives zeros (before the output projection)."""
        flat, like = _layout.indices_to_rows(_shapes.check_indices("indices", indices), self.groups)
        return self._to_layout(gather(self._grouped(self._codes()), flat), like)

    # -- freezing --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def freeze_(self, codes: Tensor | None = None) -> None:
        """Stop learning of all codes, or of those where the bool tensor `codes` ([K] or [S, K]) is True. Frozen codes still serve."""
        if codes is None:
            self.frozen.fill_(True)
        else:
            if not isinstance(codes, Tensor) or codes.dtype != torch.bool or codes.shape != self.frozen.shape:
                got = _shapes.describe(codes) if isinstance(codes, Tensor) else type(codes).__name__
                raise ValueError(f"codes must be a bool tensor of shape {list(self.frozen.shape)}, got {got}.")
            self.frozen.copy_(codes)
        self._any_frozen = bool(self.frozen.any())

    def unfreeze_(self) -> None:
        """Let every code learn again."""
        self.frozen.fill_(False)
        self._any_frozen = False

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._any_frozen = bool(self.frozen.any())

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, codebook_size={self.codebook_size}, metric={self.metric!r}, channel_dim={self.channel_dim}"
        text += f", groups={self.groups}" if self.groups > 1 else ""
        return text + (f", codebook_dim={self.codebook_dim}" if self._projects else "")


def mask_rows(mask: Tensor) -> Tensor:
    """A mask of z's shape without the channel axis as [B, N]."""
    return mask[None] if mask.dim() == 1 else mask.flatten(1)


def _normalized(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=-1)


def _where_it_counts(function, rows: Tensor, mask: Tensor | None) -> Tensor:
    """function(rows) along the last axis, NaN in rows that are masked or not finite, which then do not reach its gradients: there a
    gradient of 0 times NaN would be NaN.
    """
    if not torch.is_grad_enabled() or (mask is None and all_finite(rows.detach())):
        return function(rows)
    counts = (rows.detach() * 0).sum(-1, keepdim=True) == 0
    counts = counts if mask is None else counts & mask
    return torch.where(counts, function(torch.where(counts, rows, 0)), torch.nan)


def rerun_in_backward() -> bool:
    """True inside a forward that activation checkpointing repeats during backward."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
