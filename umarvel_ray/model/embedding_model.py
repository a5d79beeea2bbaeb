"""The embedder as a module: backbone, pooling, normalization, and the learnable temperature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from umarvel_ray.items.pictures import Picture, PictureFormat, PixelScale
from umarvel_ray.model.backbone import load_backbone
from umarvel_ray.model.batch import ItemBatch
from umarvel_ray.model.multimodal import last_hidden_state, read_pictures, tower_features, vision_tower
from umarvel_ray.model.pooling import pool, pool_packed
from umarvel_ray.recipe import ModelSettings


class EmbeddingModel(nn.Module):
    """Items in, unit vectors out.

    `log_temperature`, float32 (1,), is used by the loss only (docs/method.md#temperature-bounds).
    """

    def __init__(
        self, backbone: PreTrainedModel, settings: ModelSettings, scale: PixelScale, temperature: float = 0.05
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.settings = settings
        self.scale = scale
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)], dtype=torch.float32))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        settings: ModelSettings,
        dtype: torch.dtype | str = torch.float32,
        temperature: float = 0.05,
        quantized: bool = False,
    ) -> EmbeddingModel:
        """Load a base model or a checkpoint. For `quantized` and the errors raised, see `load_backbone`."""
        backbone, _ = load_backbone(path, settings, dtype, quantized)
        return cls(backbone, settings, PictureFormat.from_pretrained(path, settings).scale, temperature)

    @property
    def dimension(self) -> int:
        return int(self.backbone.config.text_config.hidden_size)

    def forward(self, batch: ItemBatch, visual: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Embed a batch.

        Args:
            visual: the vision tower's output by picture key, instead of running it; needs every key of the batch.

        Returns:
            float32 (B, D), rows of unit norm.
        """
        hidden = self.hidden_states(batch, visual)  # (B or 1, L, D)
        if batch.bounds is None:
            return F.normalize(pool(hidden, batch.pool_mask), dim=-1)
        return F.normalize(pool_packed(hidden, batch.pool_mask, batch.bounds), dim=-1)

    def hidden_states(self, batch: ItemBatch, visual: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The last layer's hidden states after its norm: (B, L, D), or (1, L, D) when packed."""
        if visual is None:
            visual = read_pictures(self.backbone, batch.pictures, self.scale)
        return last_hidden_state(self.backbone, batch, visual)

    def run_tower(self, pictures: Sequence[Picture]) -> tuple[torch.Tensor, ...]:
        """See `tower_features`."""
        return tower_features(vision_tower(self.backbone), pictures, self.scale)
