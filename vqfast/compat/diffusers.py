"""Face of diffusers' VectorQuantizer (diffusers.models.autoencoders.vae), the quantizer of its VQModel."""

from __future__ import annotations

from vqfast.compat import taming


class VectorQuantizer(taming.VectorQuantizer2):
    """taming's `VectorQuantizer2` under diffusers' argument names; forward(z [B, C, H, W]) -> (z_q, loss, (None, None, indices)).

    Args:
        n_e: K. vq_embed_dim: D. beta, remap, unknown_index, sane_index_shape, legacy: see `taming.VectorQuantizer2`.

    State: embedding.weight [n_e, vq_embed_dim]; `used` with remap.
    """

    def __init__(
        self,
        n_e: int,
        vq_embed_dim: int,
        beta: float,
        remap=None,
        unknown_index: str = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ):
        super().__init__(n_e, vq_embed_dim, beta, remap, unknown_index, sane_index_shape, legacy)
        self.vq_embed_dim = vq_embed_dim
