"""Rotary positions of one sequence: M-RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1) or sequential.

The reference uses sequential positions for every backbone (docs/method.md#plain-positions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Span:
    """A run of picture tokens: its grid (frame groups, rows, columns) and the time positions between two groups."""

    grid: tuple[int, int, int]
    interval: float = 1.0


def rotary_positions(is_picture: np.ndarray, spans: Sequence[Span], how: str) -> np.ndarray:
    """Time, height and width position of each token.

    Args:
        is_picture: bool (L,), True for picture tokens.
        spans: the runs of picture tokens, in order.
        how: "sequential" (0, 1, 2 … on all axes) or "mrope": a picture's tokens lie on its own grid, and the text after
            it continues from the largest of their positions, as in Qwen's own code. (transformers 5.23 ignores the
            time axis there, which matters only for videos with more frame groups than rows and columns.)

    Returns:
        int32 (3, L).
    """
    length = len(is_picture)
    if how == "sequential" or len(spans) == 0:
        return np.tile(np.arange(length, dtype=np.int32), (3, 1))
    positions = np.empty((3, length), dtype=np.int32)
    at, position = 0, 0  # next token, and the position it gets
    for span in spans:
        start = at + int(np.argmax(is_picture[at:]))
        positions[:, at:start] = position + np.arange(start - at)
        position += start - at
        at = start + int(np.prod(span.grid))
        axes = np.indices(span.grid).reshape(3, -1)
        axes[0] = (axes[0] * span.interval).astype(int)
        positions[:, start:at] = position + axes
        position += int(axes.max()) + 1
    positions[:, at:] = position + np.arange(length - at)
    return positions
