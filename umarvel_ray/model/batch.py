"""Batches of encoded items: grouped by length under a token budget, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from umarvel_ray.model.items import EncodedItem
from umarvel_ray.model.pictures import Picture

PAD = 0  # padding is masked everywhere, so any token will do that is not a picture's


class Padded:
    """What batches of items and of pairs have in common: their number of rows, and moving to a device."""

    input_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> Self:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Batch(Padded):
    """B items padded to L tokens.

    input_ids, attention_mask: int64 (B, L); pool_mask: bool (B, L), False on padding; positions: int64 (3, B, L);
    pictures: of all items, in order, on the CPU.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    pool_mask: torch.Tensor
    positions: torch.Tensor
    pictures: tuple[Picture, ...]


def default_budget(device: torch.device | str) -> int:
    """Padded tokens of a batch that suit a device: on a CPU few, which stay in its caches."""
    return 1024 if torch.device(device).type == "cpu" else 16384


def token_buckets(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group indices, longest first, so that no group's padded size (longest × count) exceeds `budget` tokens.

    An item longer than the budget has a group of its own. Equal lengths keep their order.
    """
    buckets: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if buckets and longest * (len(buckets[-1]) + 1) <= budget:
            buckets[-1].append(index)
        else:
            buckets.append([index])
            longest = lengths[index]
    return buckets


def collate(items: Sequence[EncodedItem], device: torch.device | str = "cpu", pad: int = PAD) -> Batch:
    """Pad at least one item on the right."""
    shape = (len(items), max(item.length for item in items))
    input_ids = np.full(shape, pad, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    pool_mask = np.zeros(shape, dtype=bool)
    positions = np.zeros((3, *shape), dtype=np.int64)
    for row, item in enumerate(items):
        input_ids[row, : item.length] = item.input_ids
        attention_mask[row, : item.length] = 1
        pool_mask[row, : item.length] = item.pool_mask
        positions[:, row, : item.length] = item.positions
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        pool_mask=torch.from_numpy(pool_mask),
        positions=torch.from_numpy(positions),
        pictures=tuple(picture for item in items for picture in item.pictures),
    ).to(device)
