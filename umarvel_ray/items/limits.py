"""Limits on what opening one picture or video may cost, and which formats are accepted."""

from __future__ import annotations

import math
from dataclasses import dataclass

# PIL's names; MPO is opened as JPEG. Left out: rare formats, and those that start another program (EPS: Ghostscript).
PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# Formats accepted from untrusted clients: C decoders whose time and memory are bounded by the number of pixels. TIFF
# allows tiles larger than the picture, JPEG 2000 is slow, and PIL expands BMP run lengths in Python.
WEB_FORMATS = ("AVIF", "GIF", "JPEG", "PNG", "WEBP")


@dataclass(frozen=True)
class MediaLimits:
    """Limits on one picture or video; the defaults are for a user's own files.

    Attributes:
        formats: accepted picture formats, by PIL's names.
        pixels: of a picture, or of one frame of a video.
        video_seconds: length of a video.
        video_pixels: of all frames of a video together, which is what decoding costs.
        only_bytes: accept encoded bytes only, so that a client's text can never name a file.
    """

    formats: tuple[str, ...] = PICTURE_FORMATS
    pixels: int = 100_000_000
    video_seconds: float = math.inf
    video_pixels: float = math.inf
    only_bytes: bool = False


OWN_FILES = MediaLimits()
