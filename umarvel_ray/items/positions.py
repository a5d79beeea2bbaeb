"""Rotary positions of one sequence: M-RoPE (Qwen2-VL, section 2.1) or plain counting (the reference; method 1.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """A run of picture tokens: their grid (steps, rows, columns), and how far its steps lie apart in time."""

    grid: tuple[int, int, int]
    interval: float = 1.0


def rotary_positions(is_picture: np.ndarray, spans: Sequence[Span], how: str) -> np.ndarray:
    """Time, height and width positions of each token.

    Args:
        is_picture: bool (L,), True on pictures' tokens; each span is a run of them, in order.
        how: "sequential" (0, 1, 2 … on all axes) or "mrope" (a picture's tokens lie on its own grid, and the text
            after it goes on behind the furthest of them, as in Qwen's own code; transformers 5.23 forgets the time
            axis there, which tells only for videos with more steps than rows and columns).

    Returns:
        int32 (3, L).
    """
    length = len(is_picture)
    if how == "sequential" or len(spans) == 0:
        return np.tile(np.arange(length, dtype=np.int32), (3, 1))
    positions = np.empty((3, length), dtype=np.int32)
    at, now = 0, 0
    for span in spans:
        start = at + int(np.argmax(is_picture[at:]))
        positions[:, at:start] = now + np.arange(start - at)
        now += start - at
        at = start + int(np.prod(span.grid))
        axes = np.indices(span.grid).reshape(3, -1)
        axes[0] = (axes[0] * span.interval).astype(int)
        positions[:, start:at] = now + axes
        now += int(axes.max()) + 1
    positions[:, at:] = now + np.arange(length - at)
    return positions
