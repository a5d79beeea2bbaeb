"""From pictures to the vision tower's input: resized, cut into patches, normalized (Qwen2-VL).

Gives the same values as transformers' `Qwen2VLImageProcessor`, but is several times faster on small pictures and needs
no import of that class, which takes seconds. Patches are kept as bytes, an eighth of the size of the tower's input;
they are normalized, and stills repeated in time, when the batch is built.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from umarvel_ray.errors import UserError
from umarvel_ray.items.images import MAX_ASPECT, BadImage, open_image
from umarvel_ray.items.limits import OWN_FILES, MediaLimits
from umarvel_ray.items.videos import Video, open_video

if TYPE_CHECKING:  # a process that only decodes starts without them
    import torch

    from umarvel_ray.recipe import ModelSettings
    from umarvel_ray.wording import Preparation

CONFIG = "preprocessor_config.json"
REFERENCE_SIDE = 28  # the reference's own resizing always assumes merged patches of this size


@dataclass(frozen=True)
class Picture:
    """One picture or video, patchified.

    Attributes:
        pixels: uint8 (patches, 3 · patch²); for a video (patches, 3 · times · patch²), see `PixelScale`.
        grid: number of patches in time, height and width.
        key: SHA-1 of the resized pixels; equal keys mean equal tower outputs.
        seconds: when each frame group of a video is shown; None for a still.
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
    """How a checkpoint normalizes pixels, and how many frames make a group; a still is repeated that many times."""

    factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_size: int
    times: int

    def __call__(self, pictures: Sequence[np.ndarray], device: torch.device | str = "cpu") -> torch.Tensor:
        """`Picture.pixels` of one or more pictures → the tower's input, float32 (patches, 3 · times · patch²)."""
        import torch

        if len({pixels.shape[1] for pixels in pictures}) > 1:  # both stills and videos
            return torch.cat([self([pixels], device) for pixels in pictures])
        patches = torch.from_numpy(np.concatenate(pictures)).to(device)
        colors = patches.view(len(patches), 3, -1, self.patch_size**2) * self.factor
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return ((colors - mean) / std).expand(-1, -1, self.times, -1).reshape(len(patches), -1)


@dataclass(frozen=True)
class PictureFormat:
    """How a checkpoint reads pictures: patch and merge sizes, pixel budgets and normalization.

    Attributes:
        before: pixel budget (min, max) of a first resizing to multiples of 28, as the reference does
            (docs/method.md#picture-resizing); None skips it.
        preparation: what happens to a picture before that; None: it is turned upright and put on white.
        limits: which pictures and videos may be opened.
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
    preparation: Preparation | None = None
    limits: MediaLimits = OWN_FILES
    video_fps: float | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, settings: ModelSettings, limits: MediaLimits = OWN_FILES
    ) -> PictureFormat:
        """Combine a directory's `preprocessor_config.json` with the picture sizes of the settings.

        With `resize_twice` the settings' sizes apply to the first resizing and the directory's own to the second; see
        also `Preparation`.

        Raises: see `read_picture_config`.
        """
        config, preparation = read_picture_config(path), settings.preparation
        budget = settings.min_pixels, settings.max_pixels
        first = preparation.first_budget if preparation else None
        by_directory = settings.resize_twice or (preparation is not None and preparation.own_budget)
        own = config.get("size", {})
        own_min = own.get("shortest_edge", config.get("min_pixels", budget[0]))
        own_max = own.get("longest_edge", config.get("max_pixels", budget[1]))
        return cls(
            patch_size=config["patch_size"],
            merge_size=config["merge_size"],
            min_pixels=own_min if by_directory else budget[0],
            max_pixels=own_max if by_directory else budget[1],
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
            before=budget if settings.resize_twice else first,
            preparation=preparation,
            limits=limits,
            video_fps=settings.video_fps,
        )

    def size(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """Height and width that a picture, or each of `frames` video frames, is resized to (Qwen2-VL's "smart resize").

        Both are multiples of a merged patch, and their product is within the pixel budget; the aspect ratio is kept as
        closely as that allows.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        high = self.max_pixels if frames == 1 else min(self.max_pixels, self.max_video_pixels // frames)
        return _smart_resize(height, width, self.patch_size * self.merge_size, min(self.min_pixels, high), high)


def _smart_resize(height: int, width: int, side: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"aspect ratio over {MAX_ASPECT}: {width} × {height} pixels")
    rows, columns = (max(side, round(length / side) * side) for length in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return max(side, int(height / shrink / side) * side), max(side, int(width / shrink / side) * side)
    if rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
    return rows, columns


def read_picture_config(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint's `preprocessor_config.json`.

    Raises:
        UserError: missing, unreadable, or not from a Qwen-VL image processor.
    """
    file = Path(path) / CONFIG
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give a directory with an image processor") from None
    for key in ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std"):
        if not isinstance(config, dict) or key not in config:
            raise UserError(f"{file}: no '{key}'; give a directory with a Qwen-VL image processor")
    return config


def read_pictures(item: dict[str, Any], form: PictureFormat, where: str) -> tuple[Picture, ...]:
    """An item's images, then its video.

    Raises:
        BadImage, BadVideo: one of them is unusable; the message names `where`.
    """
    images = item.get("image", [])
    opened = [read_picture(image, form, where) for image in (images if isinstance(images, list | tuple) else [images])]
    if "video" in item:
        opened.append(read_video(item["video"], form, where))
    return tuple(opened)


def read_picture(image: Any, form: PictureFormat, where: str) -> Picture:
    """Open and prepare one picture.

    Raises:
        BadImage: unusable; the message names `where`.
    """
    upright, on_white = True, True
    if form.preparation:
        upright, on_white = form.preparation.upright, form.preparation.transparency == "white"
    return _picture(_resize(open_image(image, where, form.limits, upright, on_white), form, where)[None], 1, form)


def read_video(video: Any, form: PictureFormat, where: str) -> Picture:
    """Open and prepare one video: at most `form.video_frames` frames, the last repeated to fill its group.

    Raises:
        BadVideo, BadImage: unusable; the message names `where`.
    """
    opened: Video = open_video(video, form.video_frames, where, form.limits, form.video_fps)
    times = form.scale.times
    missing = -len(opened.frames) % times
    frames = [*opened.frames, *[opened.frames[-1]] * missing]
    seconds = [*opened.seconds, *[opened.seconds[-1]] * missing]
    resized = np.stack([_resize(frame, form, where, len(frames)) for frame in frames])
    # The time of a frame group is midway between its first and last frame.
    midpoints = tuple((seconds[i] + seconds[i + times - 1]) / 2 for i in range(0, len(seconds), times))
    return _picture(resized, times, form, midpoints)


def _resize(picture: Image.Image, form: PictureFormat, where: str, frames: int = 1) -> np.ndarray:
    """uint8 (height, width, 3), with both sides multiples of a merged patch."""
    try:
        if form.preparation and (side := _square_of(picture, form, form.preparation)):
            picture = picture.resize((side, side), form.resample)
        if form.before:
            first = _smart_resize(picture.height, picture.width, REFERENCE_SIDE, *form.before)
            picture = picture.resize(first[::-1], form.resample)
        return np.asarray(picture.resize(form.size(picture.height, picture.width, frames)[::-1], form.resample))
    except ValueError as error:
        raise BadImage(f"{where}: {error}") from None


def _square_of(picture: Image.Image, form: PictureFormat, preparation: Preparation) -> int | None:
    """The side of the square that a picture becomes, whatever its shape."""
    tiny = min(picture.size) < form.patch_size * form.merge_size
    return preparation.square or (preparation.tiny if tiny else None)


def _picture(frames: np.ndarray, times: int, form: PictureFormat, seconds: tuple[float, ...] | None = None) -> Picture:
    """Patchify frames (groups · times, height, width, 3); the patches of a merged block are adjacent."""
    size, merge = form.patch_size, form.merge_size
    count, height, width, _ = frames.shape
    grid = count // times, height // size, width // size
    # (group, time, block row, row, y, block column, column, x, color)
    blocks = frames.reshape(grid[0], times, grid[1] // merge, merge, size, grid[2] // merge, merge, size, 3)
    # → (group, block row, block column, row, column, color, time, y, x)
    patches = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(math.prod(grid), -1)
    key = hashlib.sha1(f"{frames.shape} {seconds}".encode() + frames.tobytes()).hexdigest()
    return Picture(patches, grid, key, seconds)
