"""Pictures for pretraining: redrawn with changes, shown once to the picture teacher, cut into patches."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tools.demo.base_model import MEAN, MERGE, PATCH, SIDE, STD, TEMPORAL
from tools.demo.corpus import Corpus
from tools.demo.teachers import PictureTeacher

TEACHER_DIM = 256
VIEWS = 5
LEFT_RIGHT = re.compile(r"\b(left|right|flag|clock|o’clock|button|letter)\b", re.IGNORECASE)  # must not be mirrored

PICTURE = Image.new("RGB", (SIDE, SIDE))  # all pictures have the same size, so any picture is encoded alike


def redraw(pictures: Tensor, may_flip: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, rotate, scale, flip and recolor uint8 (n, 3, 64, 64); the background stays white."""
    n = len(pictures)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high, generator=generator)

    angle, zoom = uniform(-0.35, 0.35), uniform(0.65, 1.25)
    flip = torch.where((uniform(0, 1) < 0.4) & may_flip, -1.0, 1.0)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack([cos * flip, -sin, uniform(-0.1, 0.1), sin * flip, cos, uniform(-0.1, 0.1)], 1)
    grid = F.affine_grid(matrix.view(n, 2, 3), [n, 3, 64, 64], align_corners=False)
    ink = F.grid_sample(255.0 - pictures.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    light = uniform(0.75, 1.25).view(-1, 1, 1, 1)
    vivid = uniform(0.6, 1.3).view(-1, 1, 1, 1)
    tint = 1.0 + torch.empty(n, 3, 1, 1).uniform_(-0.12, 0.12, generator=generator)
    grey = ink.mean(1, keepdim=True)
    ink = (grey + (ink - grey) * vivid) * light * tint
    return (255.0 - ink).clamp(0, 255).round().byte()


def disturb(pictures: Tensor) -> Tensor:
    """What only the student sees: slightly changed brightness, and a missing square in half of the pictures."""
    pictures = pictures.float() * torch.empty(len(pictures), 3, 1, 1).uniform_(0.93, 1.07)
    for i in torch.nonzero(torch.rand(len(pictures)) < 0.5).flatten().tolist():
        side = random.randint(8, 20)
        top, left = random.randint(0, 64 - side), random.randint(0, 64 - side)
        pictures[i, :, top : top + side, left : left + side] = random.choice((255.0, 128.0, 0.0))
    return pictures


def patches_of(pictures: Tensor) -> Tensor:
    """(n, 3, 64, 64) in 0..255 → (n, 64, patch_dim), in the order of Qwen2-VL's image processor (blocks of 2x2)."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    pixels = (pictures.float() / 255.0 - mean) / std
    n, side = len(pixels), 64 // PATCH // MERGE
    pixels = pixels.view(n, 3, side, MERGE, PATCH, side, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = pixels.unsqueeze(6).expand(*pixels.shape[:6], TEMPORAL, PATCH, PATCH)
    return frames.reshape(n, 64, -1)


@dataclass
class Views:
    """Redrawn pictures and the picture teacher's maps of them; one tensor per view.

    Attributes:
        pictures: uint8 (n, 3, 64, 64).
        patches: float16 (n, 64, 112), standardized.
        cells: float16 (n, 16, TEACHER_DIM), projected onto the teacher's principal components.
    """

    pictures: list[Tensor]
    patches: list[Tensor]
    cells: list[Tensor]


def make_views(corpus: Corpus, path: Path, log: Callable[[str], None]) -> Views:
    """Make the views one by one; each finished view is cached on disk."""
    pictures = torch.from_numpy(corpus.pictures)
    may_flip = torch.tensor([not any(LEFT_RIGHT.search(t) for t in own) for own in corpus.texts])
    teacher = PictureTeacher()
    sample = [teacher(part) for part in pictures[:: max(1, len(pictures) // 600)].split(64)]
    patches, cells = (torch.cat(maps).flatten(0, 1) for maps in zip(*sample, strict=True))
    level, spread, mean = patches.mean(0), patches.std(0) + 0.05, cells.mean(0)
    values, vectors = torch.linalg.eigh((cells - mean).T @ (cells - mean) / len(cells))
    rotate = vectors[:, -TEACHER_DIM:] * values[-TEACHER_DIM:].clamp_min(1e-6) ** -0.25
    views = Views([], [], [])
    for view in range(VIEWS):
        file = path / f"view-{view}.pt"
        if not file.exists():
            generator = torch.Generator().manual_seed(view)
            new = redraw(pictures, may_flip, generator) if view else pictures
            maps = [teacher(part) for part in new.split(64)]
            inner = torch.cat([((patch - level) / spread).clamp(-6, 6).half() for patch, _ in maps])
            outer = torch.cat([((cell - mean) @ rotate).half() for _, cell in maps])
            torch.save((new, inner, outer), file)
            log(f"view {view + 1}/{VIEWS} done")
        for kept, new in zip((views.pictures, views.patches, views.cells), torch.load(file), strict=True):
            kept.append(new)
    return views
