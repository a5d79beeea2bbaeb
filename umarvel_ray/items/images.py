"""Open untrusted pictures safely: any bad one raises a one-line `BadImage` that names where it came from."""

from __future__ import annotations

import base64
import binascii
import io
import math
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from umarvel_ray.errors import UserError
from umarvel_ray.items.limits import OWN_FILES, MediaLimits

MAX_ASPECT = 200  # of what a Qwen-VL image processor takes
MAX_SCANS = 100  # JPEGs have about a dozen; one scan takes a few bytes but costs a pass over all pixels
PNG, PNG_NOTES = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
TILE = 322, 323  # TIFF tags of a tile's width and height; a tile may be larger than the picture
SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp", b"RIFF": "webp"}
_LAZY_LOAD = threading.Lock()  # several items may share a PIL picture, whose lazy loading is not thread-safe


class BadImage(UserError):
    """An unusable picture."""


def open_image(image: str | Path | bytes | Image.Image, where: str, limits: MediaLimits = OWN_FILES) -> Image.Image:
    """Read a picture as upright RGB.

    Args:
        image: a path, a `data:` URI, encoded bytes or a PIL picture. EXIF rotation is applied, transparency is
            composited on white, an animation gives its first frame, and 16-bit gray is scaled to 8 bits.
        where: names the picture in errors (file and row, or id).
        limits: formats and sizes that are accepted; a PIL picture may have any format.

    Raises:
        BadImage: missing, unreadable, truncated, empty, much longer than wide, over a limit, or given by URL.
    """
    try:
        with _LAZY_LOAD if isinstance(image, Image.Image) else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = image if isinstance(image, Image.Image) else _identify(image, where, limits)
            if picture.width * picture.height > limits.pixels:
                raise BadImage(f"{where}: picture of {picture.width}×{picture.height} is over {limits.pixels} pixels")
            if 0 in picture.size:
                raise BadImage(f"{where}: picture of {picture.width}×{picture.height} is empty")
            check_aspect(picture.size, where)
            picture.load()
            return _rgb(_upright(picture))
    except BadImage:
        raise
    except FileNotFoundError as error:
        raise BadImage(f"{where}: picture {error.filename} not found") from None
    except UnidentifiedImageError:
        raise BadImage(f"{where}: not a picture in a known format ({', '.join(limits.formats)})") from None
    # Decoders raise anything on malformed bytes (SyntaxError, struct.error, ZeroDivisionError …).
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadImage(f"{where}: picture cannot be read ({type(error).__name__}: {reason})") from None


def check_aspect(size: tuple[int, int], where: str) -> None:
    """Raises: BadImage: one side is more than MAX_ASPECT times the other."""
    if max(size) > MAX_ASPECT * min(size):
        raise BadImage(f"{where}: aspect ratio over {MAX_ASPECT}: {size[0]} × {size[1]} pixels")


def open_stream(
    source: str | Path | bytes, where: str, kind: str = "picture", limits: MediaLimits = OWN_FILES
) -> io.BytesIO:
    """The bytes behind a path, a `data:` URI or bytes; `kind` is the word for them in errors.

    Raises:
        BadImage: a URL, a malformed URI or another type; with `limits.only_bytes`, anything but bytes.
        FileNotFoundError: no such file.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if limits.only_bytes:
        raise BadImage(f"{where}: a {kind} must be bytes here, not {type(source).__name__}")
    if isinstance(source, str) and source.startswith("data:"):
        head, comma, body = source.partition(",")
        if not comma or not head.endswith(";base64"):
            raise BadImage(f"{where}: data URI is not base64-encoded")
        try:
            return io.BytesIO(base64.b64decode(body, validate=True))
        except binascii.Error:
            raise BadImage(f"{where}: data URI is not valid base64") from None
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise BadImage(f"{where}: {kind} URLs are not fetched; give a path, bytes or a data URI")
    if isinstance(source, str | Path):
        return io.BytesIO(Path(source).read_bytes())
    raise BadImage(f"{where}: a {kind} must be a path, bytes or a data URI, not {type(source).__name__}")


def image_type(content: bytes) -> str | None:
    """The media subtype (`image/…`) of an encoded picture, from its first bytes; None for other formats."""
    return next((kind for start, kind in SIGNATURES.items() if content.startswith(start)), None)


def first_picture(image: Any) -> Any:
    """The picture of a row that has one, or the first of several; None stays None."""
    return image[0] if isinstance(image, list) else image


def picture_uri(image: bytes | str | Path | list[bytes | str] | None) -> str | None:
    """A picture (encoded bytes or a path), or the first of several, as a data URI in its own format; None for none."""
    shown = first_picture(image)
    if shown is None:
        return None
    content: bytes = shown if isinstance(shown, bytes) else Path(shown).read_bytes()
    return f"data:image/{image_type(content) or 'webp'};base64,{base64.b64encode(content).decode()}"


def _identify(image: str | Path | bytes, where: str, limits: MediaLimits) -> Image.Image:
    """Open the picture and check its header; pixels are not decoded yet."""
    stream = io.BytesIO(without_png_notes(open_stream(image, where, limits=limits).getvalue()))
    picture = Image.open(stream, formats=limits.formats)
    if picture.format in ("JPEG", "MPO") and (scans := stream.getvalue().count(b"\xff\xda")) > MAX_SCANS:
        raise BadImage(f"{where}: JPEG has {scans} scans, over {MAX_SCANS}")
    if (
        isinstance(picture, TiffImageFile)
        and (tile := math.prod(picture.tag_v2.get(tag, 0) for tag in TILE)) > limits.pixels
    ):
        raise BadImage(f"{where}: TIFF tile has {tile} pixels, over {limits.pixels}")
    return picture


def without_png_notes(content: bytes) -> bytes:
    """A PNG without its texts and color profile, which Pillow refuses when long or damaged; other bytes as they are."""
    if not content.startswith(PNG):
        return content
    kept, start = [PNG], len(PNG)
    while start < len(content):
        stop = start + 12 + int.from_bytes(content[start : start + 4])  # its length, type and checksum take 12 bytes
        if content[start + 4 : start + 8] not in PNG_NOTES:
            kept.append(content[start:stop])
        start = stop
    return b"".join(kept)


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF block says; a block that cannot be read turns nothing."""
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # its parser raises anything on malformed bytes
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # PIL clips 16-bit gray at 255 instead of scaling it
        return Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        return Image.fromarray(np.asarray(picture).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
