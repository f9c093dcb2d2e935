"""Methods that `convert` puts into the quantizers of LlamaGen, 1d-tokenizer (TiTok) and VAR."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vqfast.compat import _parts


class LlamaGenMethods:
    """forward of LlamaGen's `VectorQuantizer` without entropy loss (which would need every distance)."""

    def forward(self, z: Tensor):
        """[B, C, H, W] -> (z_q, (vq_loss, commit_loss, entropy_loss, usage), (None, None, flat indices))."""
        z, codebook = z.permute(0, 2, 3, 1).contiguous(), self.embedding.weight
        if self.l2_norm:
            z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        indices = _parts.lookup(z.flatten(0, -2), codebook)
        codes = codebook[indices].view(z.shape)
        losses = (None, None, None)
        if self.training:
            into_z, into_codes = _parts.mean_errors(z, codes)
            losses = (into_codes, self.beta * into_z, z.new_zeros(()))
        z_q = _parts.straight_through(z, codes).permute(0, 3, 1, 2)
        return z_q, (*losses, self._record_usage(indices)), (None, None, indices)

    def _record_usage(self, indices: Tensor) -> float:
        """Share of codes among the last 65,536 indices; the buffer of the peer, moved on in training."""
        if not (self.show_usage and self.training):
            return 0
        recorded = self.codebook_used.detach()
        recent = torch.cat((recorded, indices.to(recorded.dtype)))[-len(recorded) :]
        recorded.copy_(recent)
        return len(torch.unique(recent)) / self.n_e


class TiTokMethods:
    """forward of 1d-tokenizer's `VectorQuantizer` (clustering_vq needs every distance and is left alone)."""

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[B, C, H, W] -> (quantized, losses and indices [B, H, W]); in float32 whatever autocast says."""
        with torch.autocast(z.device.type, enabled=False):
            z, codebook = _parts.image_rows(z.float()), self.embedding.weight
            if self.use_l2_norm:
                z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
            indices = _parts.lookup(z.flatten(0, -2), codebook)
            codes = self.get_codebook_entry(indices).view(z.shape)
            into_z, into_codes = _parts.mean_errors(z, codes)
            commitment_loss = self.commitment_cost * into_z
            result = {
                "quantizer_loss": commitment_loss + into_codes,
                "commitment_loss": commitment_loss,
                "codebook_loss": into_codes,
                "min_encoding_indices": indices.view(z.shape[:3]),
            }
            return _parts.image(_parts.straight_through(z, codes)), result


class VARMethods:
    """The three searches of VAR's multi-scale `VectorQuantizer2`; each scale quantizes what the coarser ones left over."""

    def forward(self, f_BChw: Tensor, ret_usages: bool = False):
        """[B, C, H, W] -> (f_hat with straight-through gradient, usages in percent or None, loss)."""
        f_BChw = f_BChw.float()
        fixed, scales = f_BChw.detach(), len(self.v_patch_nums)
        loss = 0.0
        with torch.autocast(f_BChw.device.type, enabled=False):
            sizes = [(n, n) for n in self.v_patch_nums]
            for level, (indices, f_hat) in enumerate(self._levels(fixed, sizes, scales)):
                if self.training and dist.is_initialized():
                    self._record_hits(level, indices)
                loss = loss + F.mse_loss(f_hat.detach(), f_BChw) * self.beta + F.mse_loss(f_hat, fixed)
            f_hat = (f_hat.detach() - fixed) + f_BChw
        return f_hat, self._usages(f_BChw) if ret_usages else None, loss * (1.0 / scales)

    def f_to_idxBl_or_fhat(self, f_BChw: Tensor, to_fhat: bool, v_patch_nums=None) -> list[Tensor]:
        """Per scale the indices [B, h w], or the sum of all scales so far."""
        sizes = [(n, n) if isinstance(n, int) else (n[0], n[1]) for n in (v_patch_nums or self.v_patch_nums)]
        if tuple(f_BChw.shape[-2:]) != sizes[-1]:
            raise AssertionError(f"the last scale is {sizes[-1]}, the features are {tuple(f_BChw.shape[-2:])}; they must agree.")
        last = len(sizes) if self.prog_si < 0 else self.prog_si + 1
        levels = self._levels(f_BChw.detach(), sizes[:last], len(sizes))
        return [f_hat if to_fhat else indices.flatten(1) for indices, f_hat in levels]

    def f_to_quant_pyramid_and_f_hat(self, f_BChw: Tensor, v_patch_nums, final_patch_id: int):
        """(indices [B, h w] of the scales up to final_patch_id, their sum)."""
        sizes = [(n, n) if isinstance(n, int) else (n[0], n[1]) for n in v_patch_nums]
        with torch.no_grad():
            levels = list(self._levels(f_BChw.detach(), sizes[: final_patch_id + 1], len(sizes)))
        return [indices.flatten(1) for indices, _ in levels], levels[-1][1]

    def _levels(self, features: Tensor, sizes, scales: int):
        """Yields (indices [B, h, w], sum of the codes so far [B, C, H, W]) from coarse to fine."""
        full = tuple(features.shape[-2:])
        rest, total = features, torch.zeros_like(features)
        for level, size in enumerate(sizes):
            coarse = rest if size == full else F.interpolate(rest, size=size, mode="area")
            indices = _parts.lookup(coarse.permute(0, 2, 3, 1), self.embedding.weight, "cosine" if self.using_znorm else "l2")
            codes = self.embedding(indices).permute(0, 3, 1, 2)
            codes = codes if size == full else F.interpolate(codes, size=full, mode="bicubic")
            codes = self.quant_resi[level / (scales - 1)](codes.contiguous())
            total, rest = total + codes, rest - codes.detach()
            yield indices, total

    def _record_hits(self, level: int, indices: Tensor) -> None:
        hits = indices.flatten().bincount(minlength=self.vocab_size).float()
        dist.all_reduce(hits)
        record, kept = self.ema_vocab_hit_SV[level], 0.9 if self.record_hit < 100 else 0.99
        record.copy_(hits if self.record_hit == 0 else record * kept + hits * (1 - kept))
        self.record_hit += 1

    def _usages(self, features: Tensor) -> list[float]:
        rows = features.numel() / features.shape[1]
        margin = dist.get_world_size() * rows / self.vocab_size * 0.08
        return [(hits >= margin).float().mean().item() * 100 for hits in self.ema_vocab_hit_SV]
