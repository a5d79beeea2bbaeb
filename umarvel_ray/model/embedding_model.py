"""The embedder as a module: backbone, pooling, unit norm, and the learnable temperature beside it."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2VLForConditionalGeneration

from umarvel_ray.model.backbone import load_backbone
from umarvel_ray.model.batch import Batch
from umarvel_ray.model.pooling import pool
from umarvel_ray.recipe import ModelSettings


class EmbeddingModel(nn.Module):
    """Items in, unit vectors out. `log_temperature` is float32 (1,), for the loss alone (trap T15)."""

    def __init__(
        self, backbone: Qwen2VLForConditionalGeneration, settings: ModelSettings, temperature: float = 0.05
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.settings = settings
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)], dtype=torch.float32))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        settings: ModelSettings,
        dtype: torch.dtype | str = torch.float32,
        temperature: float = 0.05,
    ) -> EmbeddingModel:
        """Load a base or a checkpoint. Raises: see `load_backbone`."""
        backbone, _ = load_backbone(path, settings, dtype)
        return cls(backbone, settings, temperature)

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
        return F.normalize(pool(self.hidden_states(batch, visual), batch.pool_mask), dim=-1)

    def hidden_states(self, batch: Batch, visual: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The last layer's normed hidden states (B, L, D)."""
        core = self.backbone.model
        embeds = core.get_input_embeddings()(batch.input_ids)
        if batch.image_keys:
            if visual is None:
                features = self.run_tower(batch.pixel_values, batch.grids)
            else:
                features = tuple(visual[key].to(embeds) for key in batch.image_keys)
            mask = (batch.input_ids == core.config.image_token_id).unsqueeze(-1)
            embeds = embeds.masked_scatter(mask, torch.cat(features).to(embeds))
        output = core.language_model(
            inputs_embeds=embeds,
            attention_mask=batch.attention_mask,
            position_ids=batch.positions,
            use_cache=False,
        )
        return output.last_hidden_state

    def run_tower(self, pixel_values: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The vision tower and its merger: one (tokens, D) tensor per picture."""
        core = self.backbone.model
        return core.get_image_features(pixel_values, grids, return_dict=True).pooler_output


class VisionCache:
    """The frozen tower's outputs by image key, the least recently used dropped beyond `max_bytes`."""

    def __init__(self, max_bytes: int, device: torch.device | str = "cpu") -> None:
        self.max_bytes = max_bytes
        self.device = device
        self.bytes = 0
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @torch.no_grad()
    def features(self, model: EmbeddingModel, batch: Batch) -> dict[str, torch.Tensor]:
        """Features of every picture in the batch; the tower runs once, on those not yet known."""
        found = {key: self._kept[key] for key in batch.image_keys if key in self._kept}
        new = {key: index for index, key in enumerate(batch.image_keys) if key not in found}
        if new:
            chosen = list(new.values())
            pixels = batch.pixel_values.split(batch.grids.prod(dim=1).tolist())
            outputs = model.run_tower(torch.cat([pixels[index] for index in chosen]), batch.grids[chosen])
            found |= dict(zip(new, outputs, strict=True))
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
