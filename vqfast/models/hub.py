"""The models with huggingface_hub's `push_to_hub` and `from_pretrained("user/name")`; needs vqfast[hub].

from vqfast.models.hub import VQVAE
VQVAE.from_pretrained("user/name").push_to_hub("user/other")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from . import vae, vqvae
from .pretrained import CONFIG_NAME, WEIGHTS_NAME, PretrainedModel


class HubMixin(ModelHubMixin):
    """Our files, checks and errors behind the hub's method names."""

    def _save_pretrained(self, save_directory: Path) -> None:
        PretrainedModel.save_pretrained(self, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, map_location: str = "cpu", **options: Any) -> PretrainedModel:
        folder = Path(model_id)
        if not folder.is_dir():
            names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            options = {name: options[name] for name in names if name in options}
            folder = Path(snapshot_download(model_id, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME], **options))
        return super(ModelHubMixin, cls).from_pretrained(folder, map_location)


class VQVAE(HubMixin, vqvae.VQVAE):
    """`vqfast.models.VQVAE` on the hub."""


class VAE(HubMixin, vae.VAE):
    """`vqfast.models.VAE` on the hub."""
