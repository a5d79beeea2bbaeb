"""The slice of vectors that an actor searched last, kept between calls until it needs the memory for a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import torch

Vectors = np.ndarray | torch.Tensor

_held: dict[Hashable, Vectors] = {}


def held_slice(key: Hashable, read: Callable[[], Vectors]) -> Vectors:
    """The slice of this key, read anew if another one was held."""
    if key not in _held:
        release_slice()  # before the next one is read: two may not fit
        _held[key] = read()
    return _held[key]


def release_slice() -> None:
    """Hold none."""
    _held.clear()
