"""From pictures to what the vision tower reads: resized, cut into patches, normalised (Qwen2-VL).

The same numbers as transformers' `Qwen2VLImageProcessor`, several times faster on small pictures, and without that
class, whose import takes seconds. Patches travel as bytes, an eighth of what the tower reads: they are
normalised and repeated in time where the batch is built.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from umarvel_ray.data.images import BadImage, open_image
from umarvel_ray.errors import UserError
from umarvel_ray.recipe import ModelSettings

CONFIG = "preprocessor_config.json"
MAX_ASPECT = 200


@dataclass(frozen=True)
class Pictures:
    """The pictures of one item, in order.

    pixels: uint8 (patches, 3 · patch²), see `PixelScale`; grids: int64 (n, 3) patches in time, height, width; keys:
    sha1 of each picture as resized, so that equal keys mean equal tower outputs.
    """

    pixels: np.ndarray
    grids: np.ndarray
    keys: tuple[str, ...]


@dataclass(frozen=True)
class PixelScale:
    """How a checkpoint normalises pixels, and how often it repeats a still in time."""

    factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    times: int

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3 · patch²) → float32 (n, 3 · times · patch²), what the tower reads."""
        count, size = patches.shape
        colours = patches.view(count, 3, 1, size // 3) * self.factor
        mean, std = (torch.tensor(values, device=patches.device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((colours - mean) / std).expand(-1, -1, self.times, -1).reshape(count, self.times * size)


@dataclass(frozen=True)
class PictureFormat:
    """How a checkpoint reads pictures: the sides of a patch and of a merged patch, the pixel budget, the scale."""

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    resample: int
    scale: PixelScale

    @classmethod
    def from_pretrained(cls, path: str | Path, settings: ModelSettings) -> PictureFormat:
        """What the directory's `preprocessor_config.json` says, with the settings' picture sizes.

        Raises: see `read_config`.
        """
        config = read_config(path)
        return cls(
            patch_size=config["patch_size"],
            merge_size=config["merge_size"],
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            resample=config.get("resample", Image.Resampling.BICUBIC),
            scale=PixelScale(
                factor=config.get("rescale_factor", 1 / 255),
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
                times=config["temporal_patch_size"],
            ),
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width a picture is resized to: multiples of a merged patch, the area within the pixel budget, the
        proportions as near as that allows (Qwen2-VL's "smart resize").

        Raises:
            ValueError: one side over 200 times the other.
        """
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(f"aspect ratio over {MAX_ASPECT}: {width} × {height} pixels")
        side = self.patch_size * self.merge_size
        high, wide = round(height / side) * side, round(width / side) * side
        if high * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            return max(side, int(height / shrink / side) * side), max(side, int(width / shrink / side) * side)
        if high * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
        return high, wide


def read_config(path: str | Path) -> dict[str, Any]:
    """A checkpoint's `preprocessor_config.json`.

    Raises:
        UserError: no such file, or not that of a Qwen-VL image processor.
    """
    file = Path(path) / CONFIG
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a directory with an image processor") from None
    for key in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
        if not isinstance(config, dict) or key not in config:
            raise UserError(f"{file}: no '{key}'; give a directory with a Qwen-VL image processor")
    return config


def read_pictures(images: Any, form: PictureFormat, where: str) -> Pictures:
    """Open and prepare `images`: None, one picture or a list of them.

    Raises:
        BadImage: naming `where`.
    """
    if not isinstance(images, list | tuple):
        images = [] if images is None else [images]
    resized = [_resize(open_image(image, where), form, where) for image in images]
    return Pictures(
        pixels=_patches(resized, form),
        grids=np.array([_grid(array, form) for array in resized], dtype=np.int64).reshape(-1, 3),
        keys=tuple(hashlib.sha1(repr(array.shape).encode() + array.tobytes()).hexdigest() for array in resized),
    )


def _resize(picture: Image.Image, form: PictureFormat, where: str) -> np.ndarray:
    """uint8 (height, width, 3), both sides multiples of a merged patch."""
    try:
        height, width = form.size(picture.height, picture.width)
    except ValueError as error:
        raise BadImage(f"{where}: {error}") from None
    return np.asarray(picture.resize((width, height), form.resample))


def _grid(array: np.ndarray, form: PictureFormat) -> tuple[int, int, int]:
    return 1, array.shape[0] // form.patch_size, array.shape[1] // form.patch_size


def _patches(resized: Sequence[np.ndarray], form: PictureFormat) -> np.ndarray:
    """All patches (n, 3 · patch²); the four that are merged follow each other."""
    size, merge = form.patch_size, form.merge_size
    parts = [np.empty((0, 3 * size**2), dtype=np.uint8)]
    for array in resized:
        _, rows, columns = _grid(array, form)
        blocks = array.reshape(rows // merge, merge, size, columns // merge, merge, size, 3)
        parts.append(blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1))
    return np.concatenate(parts)
