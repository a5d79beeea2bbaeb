"""The frozen vision tower, outside the module that DeepSpeed wraps.

Ranks meet different numbers of new pictures in a step; under ZeRO-3 a sharded tower would have them wait for each
other's weights. It is small and never trained, so every rank holds it whole.
"""

from __future__ import annotations

import torch
from transformers import Qwen2VLForConditionalGeneration


class FrozenTower:
    """Takes the tower out of `backbone`, which from then on needs its pictures as features."""

    def __init__(self, backbone: Qwen2VLForConditionalGeneration, device: torch.device | str):
        self._visual = backbone.model.visual.to(device).eval()
        backbone.model.visual = torch.nn.Identity()

    def run_tower(self, pixel_values: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(patches, patch_dim) pixels of n pictures → n tensors (tokens, hidden)."""
        merged = self._visual(pixel_values.to(self._visual.dtype), grid_thw=grids).pooler_output
        return merged.split((grids.prod(-1) // self._visual.spatial_merge_size**2).tolist())
