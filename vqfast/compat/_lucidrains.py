"""Methods that `convert` puts into vector_quantize_pytorch's `VectorQuantize`, its `Codebook`, and `SimVQ`."""

from __future__ import annotations

import sys
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.compat import _parts
from vqfast.ops.gather import gather

# True while a caller is about to read the N x K distances that `Codebook.forward` of the library returns.
_reads_distances: ContextVar[bool] = ContextVar("_reads_distances", default=False)


class VectorQuantizeMethods:
    """forward of `VectorQuantize`: marks the one call whose result is made of all distances, `indices=`."""

    def forward(self, x, indices=None, *args, **kwargs):
        if indices is None:
            return super().forward(x, None, *args, **kwargs)
        token = _reads_distances.set(True)
        try:
            return super().forward(x, indices, *args, **kwargs)
        finally:
            _reads_distances.reset(token)


class CodebookMethods:
    """The search and the update of `Codebook`, without distances and one-hot rows; rows are [C, ..., D], C codebooks."""

    def forward(
        self,
        x,
        sample_codebook_temp=None,
        mask=None,
        freeze_codebook=False,
        codebook_transform_fn=None,
        ema_update_weight=None,
        accum_ema_update=False,
        ema_update=None,
        topk=None,
        update_usage=True,
    ):
        """x [C, B, N, D] or [B, N, D] -> (codes, indices, None); what needs every distance runs as the library has it."""
        update = {"ema_update_weight": ema_update_weight, "accum_ema_update": accum_ema_update, "ema_update": ema_update}
        if codebook_transform_fn is not None or topk is not None or _reads_distances.get():
            return super().forward(
                x,
                sample_codebook_temp,
                mask,
                freeze_codebook,
                codebook_transform_fn,
                topk=topk,
                update_usage=update_usage,
                **update,
            )
        with torch.autocast(x.device.type, enabled=False):
            rows = (x if x.dim() >= 4 else x[None]).float()
            flat = rows.flatten(1, -2)  # [C, B N, D]
            mask = _repeat_mask(mask, flat)
            self.init_embed_(flat, mask=mask)
            if self.affine_param:
                self.update_affine(flat, self.embed, mask=mask)
            codes = self._codes(flat.dtype)
            found = _parts.lookup(flat, codes, "dot" if self.use_cosine_sim else "l2")
            quantized, indices = gather(codes, found).view(rows.shape), found.view(rows.shape[:-1])
            if self.training and update_usage and not freeze_codebook:
                self.update_codebook(flat, found, mask=mask, **update)
        if x.dim() < 4:
            quantized, indices = quantized[0], indices[0]
        return quantized, indices, None

    def _codes(self, dtype: torch.dtype) -> Tensor:
        """What rows are compared with, [C, K, D]: the codes after the bridge and the affine map."""
        codes = (self.embed if self.learnable_codebook else self.embed.detach()).to(dtype)
        codes = codes if self.vq_bridge is None else self.vq_bridge(codes)
        if not self.affine_param:
            return codes
        return (codes - self.codebook_mean) * (_std(self.batch_variance) / _std(self.codebook_variance)) + self.batch_mean

    def update_indices(self, x, embed_ind, mask=None, ema_update_weight=None, accum_ema_update=False, ema_update=None):
        """The update of rows whose codes are known: x [C, B, N, D] or [B, N, D], embed_ind without the last axis."""
        rows, found = (x, embed_ind) if x.dim() >= 4 else (x[None], embed_ind[None])
        flat = rows.float().flatten(1, -2)
        # The library counts a dropped position, -1, for code 0.
        found = found.flatten(1).clamp(min=0)
        self.update_codebook(flat, found, _repeat_mask(mask, flat), ema_update_weight, accum_ema_update, ema_update)

    update_ema_indices = update_indices

    def track_cluster_size_and_embed_avg(self, flatten, embed_onehot, mask=None, ema_update_weight=None, accum_ema_update=False):
        """Statistics of rows [C, N, D] and their indices [C, N] into the averages; one-hot rows go the library's way."""
        if embed_onehot.dim() == 3:
            return super().track_cluster_size_and_embed_avg(flatten, embed_onehot, mask, ema_update_weight, accum_ema_update)
        if self.affine_param:
            scale = _std(self.codebook_variance) / _std(self.batch_variance)
            flatten = (flatten - self.batch_mean) * scale + self.codebook_mean
        found = embed_onehot if mask is None else torch.where(mask, embed_onehot, -1)
        stats = [_parts.counts_and_sums(rows, codes, self.codebook_size) for rows, codes in zip(flatten, found)]
        counts, sums = (torch.stack(column) for column in zip(*stats))
        self.all_reduce_fn(counts)
        self.all_reduce_fn(sums)
        weight = ema_update_weight(sums, counts) if callable(ema_update_weight) else ema_update_weight
        for average, new in ((self.cluster_size, counts), (self.embed_avg, sums)):
            if average.grad is not None:  # the library keeps held-back statistics there
                new, average.grad = new + average.grad, None
            if accum_ema_update:
                average.grad = new.to(average)
            else:
                average.data.lerp_(new.to(average), _share(1.0 - self.decay, weight, average))


class SimVQMethods:
    """forward of `SimVQ`: [B, ..., D] (or channels first) -> (quantized, indices, loss)."""

    def forward(self, x):
        z = x.movedim(1, -1) if self.channel_first else x
        codebook = self.codebook
        indices = _parts.lookup(z, codebook)
        quantized = gather(codebook, indices)
        weight = self.input_to_quantize_commit_loss_weight
        loss = F.mse_loss(z.detach(), quantized) + F.mse_loss(z, quantized.detach()) * weight
        if self.rotation_trick:
            quantized = _library(self).rotate_to(z, quantized)
        else:
            quantized = (quantized - z).detach() + z
        quantized = quantized.movedim(-1, 1) if self.channel_first else quantized
        return quantized, indices, loss * self.commitment_weight


def _library(module):
    """The module of the library that defines this quantizer."""
    return sys.modules[type(module).__module__]


def _std(variance: Tensor) -> Tensor:
    return variance.clamp(min=1e-5).sqrt()


def _repeat_mask(mask: Tensor | None, flat: Tensor) -> Tensor | None:
    """[B, N] -> [C, B heads N], for rows [C, B heads N, D]."""
    if mask is None:
        return None
    heads = flat.shape[1] // mask.numel()
    return mask[None, :, None, :].expand(flat.shape[0], -1, heads, -1).reshape(flat.shape[0], -1)


def _share(share: float, weight, average: Tensor):
    """The share that new statistics get, by a weight of [K] or [C, K] per code where there is one."""
    if not isinstance(weight, Tensor):
        return share * (1.0 if weight is None else weight)
    weight = (weight if weight.dim() == 2 else weight[None]).to(average)
    return share * weight.reshape(*weight.shape, *(1,) * (average.dim() - 2))
