"""The frozen vision tower's outputs by picture key, so that a recurring picture is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from umarvel_ray.caches import ByteCache
from umarvel_ray.items.pictures import Picture
from umarvel_ray.model.multimodal import distinct


class HasTower(Protocol):
    """An embedder, a reranker, or a separate frozen tower."""

    def run_tower(self, pictures: Sequence[Picture]) -> tuple[torch.Tensor, ...]: ...


class VisionCache:
    """Up to `max_bytes` of features on `device`; the least recently used are dropped."""

    def __init__(self, max_bytes: int, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._kept: ByteCache[str, torch.Tensor] = ByteCache(max_bytes, lambda feature: feature.nbytes)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    @torch.no_grad()
    def features(self, model: HasTower, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        """Features of every picture by its key; the tower runs once, on the pictures that are not cached.

        Cached ones are on the cache's device, new ones on the tower's: `last_hidden_state` takes both.
        """
        shown = distinct(pictures)
        found = {key: feature for key in shown if (feature := self._kept.get(key)) is not None}
        new = {key: picture for key, picture in shown.items() if key not in found}
        if new:
            fresh = dict(zip(new, model.run_tower(list(new.values())), strict=True))
            found |= fresh
            for key, feature in fresh.items():
                # Copied because the tower's outputs are views of one tensor, which any of them would keep alive.
                self._kept.put(key, feature.to(self.device, copy=True))
        return found
