"""What opening one picture or video may cost, and which formats are read at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

# PIL's names; MPO is opened as JPEG. Not among them: what starts another program (EPS runs Ghostscript), and rarities.
PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# What strangers may send: decoded by C code whose time and memory the number of pixels bounds. TIFF has tiles larger
# than the picture, JPEG 2000 is slow, BMP's run lengths are unpacked in Python.
WEB_FORMATS = ("AVIF", "GIF", "JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class MediaLimits:
    """Limits on one picture or video; the defaults are for a user's own files.

    formats: PIL's names of the picture formats that are read; pixels: of a picture, or of a video's frame;
    video_seconds: a video's length; video_pixels: of all its frames together, which is what decoding costs;
    only_bytes: take encoded bytes and nothing else, so that no text from outside can name a file.
    """

    formats: tuple[str, ...] = PICTURE_FORMATS
    pixels: int = 100_000_000
    video_seconds: float = math.inf
    video_pixels: float = math.inf
    only_bytes: bool = False


OWN_FILES = MediaLimits()
