"""The frozen vision tower, kept outside the module that DeepSpeed wraps.

Ranks meet different numbers of new pictures in a step; under ZeRO-3 a sharded tower would make them wait for each
other's weights. It is small and never trained, so every rank holds all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from transformers import PreTrainedModel

from umarvel_ray.items.pictures import Picture, PixelScale
from umarvel_ray.model.multimodal import tower_features, vision_tower


class FrozenTower:
    """Takes the tower out of `backbone`, which from then on needs its pictures as features."""

    def __init__(self, backbone: PreTrainedModel, scale: PixelScale) -> None:
        self._scale = scale
        self._visual = vision_tower(backbone).eval()
        backbone.model.visual = torch.nn.Identity()

    def to(self, device: torch.device | str) -> Self:
        """Move the tower: to the engine's device, which is known only once the rest of the module is wrapped."""
        self._visual.to(device)
        return self

    def run_tower(self, pictures: Sequence[Picture]) -> tuple[torch.Tensor, ...]:
        """See `tower_features`."""
        return tower_features(self._visual, pictures, self._scale)
