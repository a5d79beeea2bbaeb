"""Open untrusted pictures safely: any bad one raises a one-line `BadImage` that names where it came from."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import sys
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
SIGNATURES = {  # of formats that browsers show
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8"),
    "bmp": re.compile(rb"BM"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "avif": re.compile(rb"....ftypavi[fs]", re.DOTALL),
}
_LAZY_LOAD = threading.Lock()  # several items may share a PIL picture, whose lazy loading is not thread-safe


class BadImage(UserError):
    """An unusable picture."""


def open_image(
    image: str | Path | bytes | Image.Image,
    where: str,
    limits: MediaLimits = OWN_FILES,
    upright: bool = True,
    on_white: bool = True,
) -> Image.Image:
    """Read a picture as RGB.

    Args:
        image: a path, a `data:` URI, encoded bytes or a PIL picture. An animation gives its first frame, and 16-bit
            gray is scaled to 8 bits.
        where: names the picture in errors (file and row, or id).
        limits: formats and sizes that are accepted; a PIL picture may have any format.
        upright: turn it as its EXIF block says.
        on_white: put a transparent picture on white; otherwise its colors are taken as they are stored.

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
            return _rgb(_upright(picture) if upright else picture, on_white)
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
    """The media subtype (`image/…`) of an encoded picture that browsers show, from its first bytes; else None."""
    return next((kind for kind, start in SIGNATURES.items() if start.match(content)), None)


def pictures_of(image: Any) -> list[Any]:
    """The pictures of a row: none, one, or a list of them."""
    return image if isinstance(image, list) else [] if image is None else [image]


def one_or_several(pictures: list[Any]) -> Any:
    """Pictures as a row has them: None, one, or a list of them."""
    return pictures[0] if len(pictures) == 1 else pictures or None


def picture_uris(image: Any, where: str = "picture") -> list[str]:
    """The pictures of a row as data URIs; those that cannot be shown are left out (see `picture_file`)."""
    found = (picture_file(shown, where) for shown in pictures_of(image))
    return [f"data:image/{kind};base64,{base64.b64encode(content).decode()}" for kind, content in filter(None, found)]


def picture_file(image: Any, where: str = "picture") -> tuple[str, bytes] | None:
    """A picture as a file that browsers show: its kind, such as "png", and its bytes.

    A format that they do not know becomes PNG. One that cannot be read is left out, which is printed.

    Args:
        image: encoded bytes, a path, a data URI or a PIL picture.
        where: names the picture in what is printed.

    Returns:
        None for one that cannot be read.
    """
    try:
        content = b"" if isinstance(image, Image.Image) else open_stream(image, where).getvalue()
        kind = image_type(content)
        if kind is None:
            kind, buffer = "png", io.BytesIO()
            open_image(image, where).save(buffer, "PNG")
            content = buffer.getvalue()
    except (BadImage, OSError, ValueError) as error:
        print(f"{where}: not shown ({str(error).removeprefix(f'{where}: ')})", file=sys.stderr)
        return None
    return kind, content


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


def _gray(values: np.ndarray) -> np.ndarray:
    """uint8 of int32 or float32 gray, whose white the file does not name: the least of 1 (of floats), 255 and 65,535
    that holds all values, or else the largest value."""
    shown = np.nan_to_num(values.astype(np.float64), posinf=0.0).clip(0)
    largest = shown.max()
    whites = (1, 255, 65_535) if values.dtype.kind == "f" else (255, 65_535)
    white = next((white for white in whites if largest <= white), largest)
    return np.asarray((shown * (255 / white)).round(), np.uint8)


def _rgb(picture: Image.Image, on_white: bool) -> Image.Image:
    if picture.mode.startswith("I;16"):  # PIL clips 16-bit gray at 255 instead of scaling it
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        return Image.fromarray(_gray(np.asarray(picture))).convert("RGB")
    if on_white and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
