"""Malicious pictures: any bytes give an item or a one-line error, in bounded memory."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import EncodedItem, ItemEncoder
from umarvel_ray.items.images import MAX_SCANS, BadImage, open_image
from umarvel_ray.items.limits import WEB_FORMATS, MediaLimits
from umarvel_ray.recipe import ModelSettings
from umarvel_ray.serving.settings import Limits

SETTINGS = ModelSettings(min_pixels=256, max_pixels=4096)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(NOISE, "RGBA").convert(mode)


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


MOVING = {"save_all": True, "append_images": [noise().rotate(90), noise().rotate(180)], "duration": 40}
VALID = {
    "jpeg": encoded(noise(), "JPEG"),
    "progressive jpeg": encoded(noise(), "JPEG", progressive=True),
    "turned jpeg": encoded(noise(), "JPEG", exif=exif(6)),
    "cmyk jpeg": encoded(noise("CMYK"), "JPEG"),
    "mpo": encoded(noise(), "MPO", save_all=True, append_images=[noise()]),
    "png": encoded(noise(), "PNG"),
    "png with alpha": encoded(noise("RGBA"), "PNG"),
    "png with palette": encoded(noise("P"), "PNG", transparency=3),
    "16-bit png": encoded(Image.fromarray(NOISE.view(np.uint16)[..., 0]), "PNG"),
    "bilevel png": encoded(noise("1"), "PNG"),
    "moving png": encoded(noise(), "PNG", **MOVING),
    "gif": encoded(noise(), "GIF", **MOVING),
    "webp": encoded(noise("RGBA"), "WEBP"),
    "lossless webp": encoded(noise("RGBA"), "WEBP", lossless=True),
    "moving webp": encoded(noise(), "WEBP", **MOVING),
    "avif": encoded(noise("RGBA"), "AVIF", speed=10),
    "tiff": encoded(noise(), "TIFF", compression="tiff_lzw"),
    "jpeg tiff": encoded(noise(), "TIFF", compression="jpeg"),
    "float tiff": encoded(noise("F"), "TIFF"),
    "bmp": encoded(noise(), "BMP"),
    "jpeg 2000": encoded(noise(), "JPEG2000"),
    "ppm": encoded(noise(), "PPM"),
}
WEB = [name for name in VALID if name.split()[-1] in ("jpeg", "mpo", "png", "alpha", "palette", "gif", "webp", "avif")]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, rows: bytes | None = None) -> bytes:
    """A black PNG assembled by hand; `rows` are already deflated."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + width) * height)) if rows is None else rows
    ihdr, idat = chunk(b"IHDR", header), chunk(b"IDAT", rows)
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"".join(chunks) + idat + chunk(b"IEND", b"")


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated `count` more times."""
    data = VALID["progressive jpeg"]
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def giant_tile(data: bytes) -> bytes:
    """A TIFF of one pixel in a tile of 40,000 × 40,000, deflated."""
    tags = [
        (256, 4, 1),
        (257, 4, 1),
        (258, 3, 8),
        (259, 3, 8),
        (262, 3, 1),
        (277, 3, 1),
        (322, 4, 40_000),
        (323, 4, 40_000),
    ]
    tags += [(324, 4, 8), (325, 4, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run showpage\n%%EOF\n"


def bombs() -> dict[str, bytes]:
    zeros = zlib.compress(bytes(200_000_000), 1)
    text = zlib.compress(b"x" * 1_000_000)
    screen = struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x44\x01\x00;"
    return {
        "pixels": encoded(Image.new("1", (20_000, 20_000)), "PNG"),
        "pixels of a gif": b"GIF89a" + screen + frame,
        "text": png(9, 9, chunk(b"zTXt", b"a\0\0" + zeros)),
        "many texts": png(9, 9, *[chunk(b"zTXt", b"a%d\0\0" % n + text) for n in range(200)]),
        "color profile": png(9, 9, chunk(b"iCCP", b"a\0\0" + zeros)),
        "rows": png(9, 9, rows=zeros),
        "scans": scans(100_000),
        "tile": giant_tile(zeros),
    }


@pytest.fixture(scope="module")
def client(tiny_base) -> ItemEncoder:
    return ItemEncoder.from_pretrained(tiny_base, SETTINGS, Limits().media())


@pytest.fixture(scope="module")
def every(tiny_base) -> ItemEncoder:
    """An encoder that accepts every format, not only the web's."""
    return ItemEncoder.from_pretrained(tiny_base, SETTINGS, MediaLimits(pixels=1_000_000, only_bytes=True))


@pytest.mark.parametrize("name", VALID)
def test_clients_may_send_only_web_formats(client, name):
    if name in WEB:
        assert client.encode({"image": VALID[name]}, "document").pictures
    else:
        with pytest.raises(BadImage, match=f"x: not a picture in a known format .{', '.join(WEB_FORMATS)}."):
            client.encode({"image": VALID[name]}, "document", "x")
    assert open_image(VALID[name], "x").mode == "RGB"


@pytest.mark.parametrize("data", [EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS])
def test_no_format_starts_another_program(data):
    assert Image.open(io.BytesIO(data)).format == "EPS"  # PIL alone would open it
    with pytest.raises(BadImage, match="not a picture in a known format"):
        open_image(data, "x")


@pytest.mark.parametrize("name", VALID)
def test_truncated_pictures_are_errors(every, name):
    for length in (1, 10, len(VALID[name]) // 3):
        with pytest.raises(UserError):
            every.encode({"image": VALID[name][:length]}, "document")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(0, 0), "cannot be read|is empty|not a picture"),
        (png(0, 5), "cannot be read|is empty|not a picture"),
        (b"GIF89a" + bytes(7) + b";", "cannot be read|is empty|not a picture"),
        (VALID["png"][:8] + VALID["jpeg"][8:], "cannot be read|not a picture"),
        (VALID["jpeg"][:3] + VALID["png"][3:], "cannot be read|not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>", "not a picture"),
        (encoded(Image.new("L", (4097, 4096)), "PNG"), "4097×4096 is over 16777216 pixels"),
        (encoded(Image.new("L", (4000, 2)), "PNG"), "aspect ratio"),
        (scans(MAX_SCANS), f"scans, over {MAX_SCANS}"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_bad_bytes_are_one_line(client, data, message):
    with pytest.raises(BadImage, match=message) as error:
        client.encode({"image": data}, "document", "input[3]")
    assert str(error.value).startswith("input[3]: ")
    assert "\n" not in str(error.value)


def test_no_text_from_a_client_names_a_file(client, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(VALID["png"])
    uri = "data:image/png;base64," + base64.b64encode(VALID["png"]).decode()
    for source in (str(path), path, f"file://{path}", uri, [VALID["png"], str(path)]):
        for key in ("image", "video"):
            with pytest.raises(UserError, match="must be bytes here"):
                client.encode({key: source}, "document")


def test_bombs_take_little_memory():
    """In a fresh process, with a client's limits and with those of own files."""
    script = """
import base64, json, sys
from umarvel_ray.items.images import open_image
from umarvel_ray.items.limits import OWN_FILES
from umarvel_ray.errors import UserError
from umarvel_ray.serving.settings import Limits
bombs = {name: base64.b64decode(data) for name, data in json.load(sys.stdin).items()}
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
before, results = peak(), {}
for name, data in bombs.items():
    for limits in (Limits().media(), OWN_FILES):
        try:
            results[name] = open_image(data, "x", limits).size
        except UserError as error:
            results[name] = str(error)
print(json.dumps([peak() - before, results]))
"""
    stdin = json.dumps({name: base64.b64encode(data).decode() for name, data in bombs().items()})
    run = subprocess.run([sys.executable, "-c", script], input=stdin, stdout=subprocess.PIPE, text=True, check=True)
    megabytes, results = json.loads(run.stdout)
    assert megabytes < 120
    for name in ("rows", "text", "many texts", "color profile"):
        assert results.pop(name) == [9, 9], name  # what the pixels do not need is not decompressed
    assert all(isinstance(line, str) and "MemoryError" not in line for line in results.values())


SCRAMBLE = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.floats(0, 1), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 64)),
        st.tuples(st.just("put"), st.floats(0, 1), st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("again"), st.floats(0, 1), st.integers(1, 512)),
    ),
    min_size=1,
    max_size=8,
)


def scrambled(data: bytes, edits: list[tuple]) -> bytes:
    """Valid bytes with some overwritten, removed, inserted or repeated, mostly near the start, where headers are."""
    for what, share, value in edits:
        at = int(share**3 * len(data))
        if what == "set":
            data = data[:at] + bytes([value]) + data[at + 1 :]
        elif what == "cut":
            data = data[:at] + data[at + value :]
        elif what == "put":
            data = data[:at] + value + data[at:]
        else:
            data = data[:at] + data[at : at + value] + data[at:]
    return data


@settings(max_examples=400)
@given(st.sampled_from(sorted(VALID)), SCRAMBLE)
def test_scrambled_pictures_are_items_or_one_line(every, name, edits):
    data = scrambled(VALID[name], edits)
    assert isinstance(outcome(lambda: every.encode({"image": data}, "document", "input[0]")), EncodedItem | str)


def outcome(make: Callable[[], object]) -> object:
    """The result of `make`, or its one-line error."""
    try:
        return make()
    except UserError as error:
        line = str(error)
    assert line.startswith("input[0]: ")
    assert "\n" not in line
    return line
