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

from umarvel_ray.errors import UserError
from umarvel_ray.items.images import BadImage, open_image
from umarvel_ray.items.limits import OWN_FILES, MediaLimits
from umarvel_ray.items.videos import Video, open_video
from umarvel_ray.recipe import ModelSettings

CONFIG = "preprocessor_config.json"
REFERENCE_SIDE = 28  # the reference's own resizing knows no other merged patch
MAX_ASPECT = 200


@dataclass(frozen=True)
class Picture:
    """One picture or video as the tower reads it.

    pixels: uint8 (patches, 3 · patch²), a video's (patches, 3 · times · patch²), see `PixelScale`; grid: patches in
    time, height, width; key: sha1 of what was resized, so that equal keys mean equal tower outputs; seconds: when each
    step of a video's grid was shown, None for a still.
    """

    pixels: np.ndarray
    grid: tuple[int, int, int]
    key: str
    seconds: tuple[float, ...] | None = None

    @property
    def is_video(self) -> bool:
        return self.seconds is not None


@dataclass(frozen=True)
class PixelScale:
    """How a checkpoint normalises pixels, and how many frames make a step: a still is repeated as often."""

    factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_size: int
    times: int

    def __call__(self, pictures: Sequence[np.ndarray], device: torch.device | str = "cpu") -> torch.Tensor:
        """`Picture.pixels` of at least one picture → float32 (patches, 3 · times · patch²), what the tower reads."""
        if len({pixels.shape[1] for pixels in pictures}) > 1:  # stills beside videos
            return torch.cat([self([pixels], device) for pixels in pictures])
        patches = torch.from_numpy(np.concatenate(pictures)).to(device)
        colours = patches.view(len(patches), 3, -1, self.patch_size**2) * self.factor
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((colours - mean) / std).expand(-1, -1, self.times, -1).reshape(len(patches), -1)


@dataclass(frozen=True)
class PictureFormat:
    """How a checkpoint reads pictures: the sides of a patch and of a merged patch, the pixel budgets, the scale.

    `before`: pixel budget of a resizing to multiples of 28 that comes first (the reference, trap T9); `limits`: which
    pictures and videos are opened at all.
    """

    patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    video_frames: int
    max_video_pixels: int
    resample: int
    scale: PixelScale
    before: tuple[int, int] | None = None
    limits: MediaLimits = OWN_FILES

    @classmethod
    def from_pretrained(
        cls, path: str | Path, settings: ModelSettings, limits: MediaLimits = OWN_FILES
    ) -> PictureFormat:
        """What the directory's `preprocessor_config.json` says, with the settings' picture sizes.

        With `resize_twice` the settings' sizes hold for the first resizing, the directory's own for the second.

        Raises: see `read_picture_config`.
        """
        config = read_picture_config(path)
        budget = settings.min_pixels, settings.max_pixels
        own = config.get("size", {})
        least = own.get("shortest_edge", config.get("min_pixels", budget[0]))
        most = own.get("longest_edge", config.get("max_pixels", budget[1]))
        return cls(
            patch_size=config["patch_size"],
            merge_size=config["merge_size"],
            min_pixels=least if settings.resize_twice else budget[0],
            max_pixels=most if settings.resize_twice else budget[1],
            video_frames=settings.video_frames,
            max_video_pixels=settings.max_video_pixels,
            resample=config.get("resample", Image.Resampling.BICUBIC),
            scale=PixelScale(
                factor=config.get("rescale_factor", 1 / 255),
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
                patch_size=config["patch_size"],
                times=config["temporal_patch_size"],
            ),
            before=budget if settings.resize_twice else None,
            limits=limits,
        )

    def size(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """Height and width a picture, or a frame of a video, is resized to: multiples of a merged patch, the area
        within the pixel budget, the proportions as near as that allows (Qwen2-VL's "smart resize").

        Raises:
            ValueError: one side over 200 times the other.
        """
        most = self.max_pixels if frames == 1 else min(self.max_pixels, self.max_video_pixels // frames)
        return _smart_resize(height, width, self.patch_size * self.merge_size, min(self.min_pixels, most), most)


def _smart_resize(height: int, width: int, side: int, least: int, most: int) -> tuple[int, int]:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"aspect ratio over {MAX_ASPECT}: {width} × {height} pixels")
    high, wide = round(height / side) * side, round(width / side) * side
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        return max(side, int(height / shrink / side) * side), max(side, int(width / shrink / side) * side)
    if high * wide < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
    return high, wide


def read_picture_config(path: str | Path) -> dict[str, Any]:
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


def read_picture(image: Any, form: PictureFormat, where: str) -> Picture:
    """Open and prepare one picture.

    Raises:
        BadImage: naming `where`.
    """
    return _picture(_resize(open_image(image, where, form.limits), form, where)[None], 1, form)


def read_video(video: Any, form: PictureFormat, where: str) -> Picture:
    """Open and prepare one video: `form.video_frames` frames at most, the last repeated where a step wants more.

    Raises:
        BadVideo, BadImage: naming `where`.
    """
    shown: Video = open_video(video, form.video_frames, where, form.limits)
    times = form.scale.times
    short = -len(shown.frames) % times
    frames = [*shown.frames, *[shown.frames[-1]] * short]
    seconds = [*shown.seconds, *[shown.seconds[-1]] * short]
    resized = np.stack([_resize(frame, form, where, len(frames)) for frame in frames])
    # A step of several frames is shown midway between its first and its last.
    steps = tuple((seconds[i] + seconds[i + times - 1]) / 2 for i in range(0, len(seconds), times))
    return _picture(resized, times, form, steps)


def _resize(picture: Image.Image, form: PictureFormat, where: str, frames: int = 1) -> np.ndarray:
    """uint8 (height, width, 3), both sides multiples of a merged patch."""
    try:
        if form.before:
            first = _smart_resize(picture.height, picture.width, REFERENCE_SIDE, *form.before)
            picture = picture.resize(first[::-1], form.resample)
        return np.asarray(picture.resize(form.size(picture.height, picture.width, frames)[::-1], form.resample))
    except ValueError as error:
        raise BadImage(f"{where}: {error}") from None


def _picture(frames: np.ndarray, times: int, form: PictureFormat, seconds: tuple[float, ...] | None = None) -> Picture:
    """Frames (steps · times, height, width, 3) cut into patches; the four that are merged follow each other."""
    size, merge = form.patch_size, form.merge_size
    count, height, width, _ = frames.shape
    grid = count // times, height // size, width // size
    blocks = frames.reshape(grid[0], times, grid[1] // merge, merge, size, grid[2] // merge, merge, size, 3)
    patches = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(math.prod(grid), -1)
    key = hashlib.sha1(f"{frames.shape} {seconds}".encode() + frames.tobytes()).hexdigest()
    return Picture(patches, grid, key, seconds)
