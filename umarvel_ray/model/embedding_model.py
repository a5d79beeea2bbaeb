"""The embedder as a module: backbone, pooling, unit norm, and the learnable temperature beside it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from umarvel_ray.model.backbone import load_backbone
from umarvel_ray.model.batch import Batch
from umarvel_ray.model.multimodal import distinct, last_hidden_state, read_pictures, tower_features
from umarvel_ray.model.pictures import Picture, PictureFormat, PixelScale
from umarvel_ray.model.pooling import pool, pool_packed
from umarvel_ray.recipe import ModelSettings


class EmbeddingModel(nn.Module):
    """Items in, unit vectors out. `log_temperature` is float32 (1,), for the loss alone (trap T15)."""

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
        quantised: bool = False,
    ) -> EmbeddingModel:
        """Load a base or a checkpoint. `quantised`, raises: see `load_backbone`."""
        backbone, _ = load_backbone(path, settings, dtype, quantised)
        return cls(backbone, settings, PictureFormat.from_pretrained(path, settings).scale, temperature)

    @property
    def dimension(self) -> int:
        return self.backbone.config.text_config.hidden_size

    def forward(self, batch: Batch, visual: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Embed a batch.

        Args:
            visual: the tower's output by image key, in place of running it; needs every key of the batch.

        Returns:
            float32 (B, D), rows of unit norm.
        """
        hidden = self.hidden_states(batch, visual)
        if batch.bounds is None:
            return F.normalize(pool(hidden, batch.pool_mask), dim=-1)
        return F.normalize(pool_packed(hidden, batch.pool_mask, batch.bounds), dim=-1)

    def hidden_states(self, batch: Batch, visual: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The last layer's normed hidden states (B, L, D), or (1, L, D) of a packed batch."""
        if visual is None:
            visual = read_pictures(self.backbone, batch.pictures, self.scale)
        return last_hidden_state(self.backbone, batch, visual)

    def run_tower(self, pictures: Sequence[Picture]) -> tuple[torch.Tensor, ...]:
        """See `tower_features`."""
        return tower_features(self.backbone.model.visual, pictures, self.scale)


class HasTower(Protocol):
    """An embedder, a reranker, or a frozen tower of its own."""

    def run_tower(self, pictures: Sequence[Picture]) -> tuple[torch.Tensor, ...]: ...


class VisionCache:
    """The frozen tower's outputs by picture key, the least recently used dropped beyond `max_bytes`."""

    def __init__(self, max_bytes: int, device: torch.device | str = "cpu") -> None:
        self.max_bytes = max_bytes
        self.device = device
        self.bytes = 0
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @torch.no_grad()
    def features(self, model: HasTower, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        """Features of every picture by its key; the tower runs once, on those not yet known."""
        found = {picture.key: self._kept[picture.key] for picture in pictures if picture.key in self._kept}
        new = {key: picture for key, picture in distinct(pictures).items() if key not in found}
        if new:
            found |= dict(zip(new, model.run_tower(list(new.values())), strict=True))
        for key, value in found.items():
            self._keep(key, value)
        return found

    def _keep(self, key: str, value: torch.Tensor) -> None:
        if key not in self._kept:
            # A clone: the tower's outputs are views of one tensor, which a view would keep alive.
            self._kept[key] = value.to(self.device, copy=True)
            self.bytes += value.nbytes
        self._kept.move_to_end(key)
        while self.bytes > self.max_bytes:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes
