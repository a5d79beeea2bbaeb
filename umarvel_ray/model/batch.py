"""Batches of encoded items under a token budget: rows of similar lengths padded on the right, or one packed row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch

from umarvel_ray.items.encoder import EncodedItem
from umarvel_ray.items.pair_encoder import IGNORED, EncodedPair
from umarvel_ray.items.pictures import Picture

PADDED_SHARE = 1 / 32  # of a token budget; on a CPU 32 tokens, which cost about as much as one more forward pass
PAD = 0  # padding is masked everywhere, so any token works except a picture's


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """B token sequences, padded to L tokens each or, if `bounds` is set, packed into one row of L tokens.

    Attributes:
        input_ids: int64 (B, L), packed (1, L).
        positions: int64 (3, B, L), packed (3, 1, L).
        attention_mask: int64 (B, L), 0 on padding; None when packed.
        pictures: of all sequences, in order, on the CPU.
        bounds: int32 (B + 1,), where each packed sequence begins and ends.
        longest: tokens of the longest sequence.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    attention_mask: torch.Tensor | None
    pictures: tuple[Picture, ...]
    bounds: torch.Tensor | None = None
    longest: int = 0

    def __len__(self) -> int:
        return len(self.input_ids) if self.bounds is None else len(self.bounds) - 1

    def to(self, device: torch.device | str) -> Self:
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)

    def sequence_of(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Index of the sequence that each token at (row, column) belongs to: int64, shaped like `columns`."""
        return rows if self.bounds is None else torch.bucketize(columns, self.bounds[1:], right=True)


@dataclass(frozen=True, kw_only=True)
class ItemBatch(Sequences):
    """A batch of items; pool_mask: bool, shaped like input_ids, True on the tokens that are pooled."""

    pool_mask: torch.Tensor


class Encoded(Protocol):
    """What a batch is made of: an `EncodedItem` or an `EncodedPair`."""

    @property
    def positions(self) -> np.ndarray: ...

    @property
    def pictures(self) -> tuple[Picture, ...]: ...

    @property
    def length(self) -> int: ...


def default_budget(device: torch.device | str) -> int:
    """A batch size in tokens that suits the device: small on a CPU, so that activations stay in its caches."""
    return 1024 if torch.device(device).type == "cpu" else 16384


def token_buckets(lengths: Sequence[int], budget: int, packed: bool = False) -> list[list[int]]:
    """Group indices, longest first, so that no group exceeds `budget` tokens.

    A group's size is what is computed: longest × count when padded, the sum when packed. An item longer than the budget
    gets a group of its own. Equal lengths keep their order. A padded group also ends where its padding would exceed
    `PADDED_SHARE` of the budget: another forward pass then takes less time.
    """
    buckets: list[list[int]] = []
    size = padding = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # When padded, every item costs as much as the group's first, which is the longest.
        cost = lengths[index] if packed or not buckets else lengths[buckets[-1][0]]
        if buckets and size + cost <= budget and padding + cost - lengths[index] <= budget * PADDED_SHARE:
            buckets[-1].append(index)
            size += cost
            padding += cost - lengths[index]
        else:
            buckets.append([index])
            size, padding = lengths[index], 0
    return buckets


def collate(
    items: Sequence[EncodedItem], device: torch.device | str = "cpu", packed: bool = False, pad: int = PAD
) -> ItemBatch:
    """A batch of at least one item."""
    return ItemBatch(**arrange(items, {"input_ids": pad, "pool_mask": False}, packed)).to(device)


def arrange(sequences: Sequence[Encoded], fill: Mapping[str, int | bool], packed: bool) -> dict[str, Any]:
    """The fields of a `Sequences` on the CPU, with one array for each name in `fill`.

    Args:
        fill: the padding value of each array, by the name of the sequences' attribute.
    """
    lengths = [sequence.length for sequence in sequences]
    longest, mask, bounds = max(lengths), None, None
    if packed:
        bounds = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
        arrays = {name: np.concatenate([getattr(s, name) for s in sequences])[None] for name in fill}
        positions = np.concatenate([s.positions for s in sequences], axis=1)[:, None]
    else:
        shape = (len(sequences), longest)
        mask = torch.from_numpy((np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64))
        arrays = {name: np.full(shape, value) for name, value in fill.items()}
        positions = np.zeros((3, *shape), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            for name, array in arrays.items():
                array[row, : sequence.length] = getattr(sequence, name)
            positions[:, row, : sequence.length] = sequence.positions
    return {
        **{
            name: torch.from_numpy(array.astype(bool if fill[name] is False else np.int64))
            for name, array in arrays.items()
        },
        "positions": torch.from_numpy(positions.astype(np.int64)),
        "attention_mask": mask,
        "bounds": bounds,
        "longest": longest,
        "pictures": tuple(picture for sequence in sequences for picture in sequence.pictures),
    }


@dataclass(frozen=True, kw_only=True)
class PairBatch(Sequences):
    """A batch of pairs, or of one side of them; labels: int64, shaped like input_ids."""

    labels: torch.Tensor


def collate_pairs(pairs: Sequence[EncodedPair], device: torch.device | str = "cpu", packed: bool = False) -> PairBatch:
    """A batch of at least one pair."""
    return PairBatch(**arrange(pairs, {"input_ids": PAD, "labels": IGNORED}, packed)).to(device)
