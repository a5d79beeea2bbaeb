"""Rotary positions of one sequence: M-RoPE (Qwen2-VL, section 2.1) or plain counting (the reference; method 1.5)."""

from __future__ import annotations

import numpy as np


def rotary_positions(
    input_ids: np.ndarray, grids: np.ndarray, *, image_token_id: int, merge_size: int, how: str
) -> np.ndarray:
    """Time, height and width positions of each token.

    Args:
        input_ids: (L,) token ids; each picture is a run of `image_token_id`.
        grids: (n_images, 3) patches in time, height and width, in the order of the runs.
        how: "sequential" (0, 1, 2 … on all axes) or "mrope" (a picture's tokens lie on its own grid, and the text
            after it goes on from the grid's longer side).

    Returns:
        int32 (3, L).
    """
    length = len(input_ids)
    if how == "sequential" or len(grids) == 0:
        return np.tile(np.arange(length, dtype=np.int32), (3, 1))
    positions = np.empty((3, length), dtype=np.int32)
    is_image = input_ids == image_token_id
    at, now = 0, 0
    for time, height, width in grids:
        start = at + int(np.argmax(is_image[at:]))
        positions[:, at:start] = now + np.arange(start - at)
        now += start - at
        shape = (int(time), int(height) // merge_size, int(width) // merge_size)
        at = start + int(np.prod(shape))
        positions[:, start:at] = now + np.indices(shape).reshape(3, -1)
        now += max(shape[1:])
    positions[:, at:] = now + np.arange(length - at)
    return positions
