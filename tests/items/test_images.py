"""Opening and resizing pictures from every source, and a one-line error for each bad one."""

import base64
import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.items.images import BadImage, open_image, picture_uris, without_png_notes
from umarvel_ray.items.limits import MediaLimits
from umarvel_ray.items.pictures import CONFIG, PictureFormat, PixelScale, read_picture
from umarvel_ray.presets import read_preset
from umarvel_ray.recipe import ModelSettings
from umarvel_ray.wording import Preparation

RED, BLUE = (255, 0, 0), (0, 0, 255)
REFERENCE = read_preset("reference").of("qwen3_vl")
QWEN3VL_PICTURES = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def half_and_half(mode: str = "RGB") -> Image.Image:
    """Left red, right blue, 8 × 4."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4], pixels[:, 4:] = RED, BLUE
    return Image.fromarray(pixels).convert(mode)


def test_every_source_gives_the_same_picture(tmp_path):
    data = encoded(half_and_half())
    path = tmp_path / "a.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), data, bytearray(data), memoryview(data), uri, half_and_half()):
        picture = open_image(source, "x")
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture), np.asarray(half_and_half()))


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned; rotate by a quarter clockwise
    picture = open_image(encoded(half_and_half(), exif=exif), "x")
    assert picture.size == (4, 8)
    assert picture.getpixel((0, 0)) == RED
    assert picture.getpixel((0, 7)) == BLUE


def with_text(chunk: str, **options) -> bytes:
    notes = PngInfo()
    getattr(notes, f"add_{chunk}")("workflow", "y" * 1_100_000, **options)
    return encoded(half_and_half(), pnginfo=notes)


@pytest.mark.parametrize(
    "data",
    [
        encoded(half_and_half(), exif=b"Exif\0\0nonsense"),
        encoded(half_and_half(), "WEBP", exif=b"Exif\0\0nonsense", lossless=True),
        with_text("itxt", zip=True),
        with_text("text", zip=True),
        with_text("text"),
        encoded(half_and_half(), icc_profile=b"nonsense" * 200_000),
    ],
    ids=["EXIF in PNG", "EXIF in WebP", "long iTXt", "long zTXt", "long tEXt", "long color profile"],
)
def test_metadata_never_hurts_the_pixels(data):
    assert np.array_equal(np.asarray(open_image(data, "x")), np.asarray(half_and_half()))


@given(st.binary(max_size=200), st.integers(0, 70), st.booleans())
def test_a_cut_or_changed_png_ends(noise, start, whole):
    png = encoded(half_and_half())
    damaged = png[: 8 + start] + noise + (png[8 + start :] if whole else b"")
    assert without_png_notes(png) == png
    assert len(without_png_notes(damaged)) <= len(damaged)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(mode):
    picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    picture.putpixel((1, 0), (0, 0, 0, 255))
    opened = open_image(encoded(picture.convert(mode)), "x")
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 0)) == (0, 0, 0)


def test_half_transparent_is_mixed_with_white():
    opened = open_image(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128))), "x")
    assert opened.getpixel((0, 0)) == (255, 127, 127)


def test_cmyk_gray_bilevel_and_palette():
    jpeg = open_image(encoded(half_and_half("CMYK"), "JPEG", quality=95), "x")
    assert np.abs(np.asarray(jpeg).astype(int) - np.asarray(half_and_half())).mean() < 40
    assert open_image(encoded(Image.new("L", (2, 2), 100)), "x").getpixel((0, 0)) == (100, 100, 100)
    assert open_image(encoded(Image.new("1", (2, 2), 1)), "x").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(half_and_half("P")), "x").getpixel((0, 0)) == RED


def test_sixteen_bit_gray_is_scaled_not_clipped():
    levels = np.array([[0, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(levels)), "x")
    assert [opened.getpixel((i, 0))[0] for i in range(4)] == [0, 0x40, 0x80, 0xFF]


def test_the_first_frame_of_an_animation():
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)
    assert open_image(encoded(first, "GIF", save_all=True, append_images=[second]), "x").getpixel((0, 0)) == RED


def blank(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that decodes to width × height pixels."""
    return encoded(Image.new("1", (width, height)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.png", "nowhere.png not found"),
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (encoded(Image.effect_noise((64, 64), 50))[:900], "cannot be read"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "cannot be read"),
        (blank(10_001, 10_000), "10001×10000 is over 100000000 pixels"),
        (blank(20_000, 20_000), "cannot be read .DecompressionBombError"),
        (Image.new("RGB", (0, 5)), "0×5 is empty"),
        ("https://example.org/a.png", "not fetched"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64,@@@", "not valid base64"),
        (3.5, "not float"),
        ("a\0b", "cannot be read"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_bad_pictures_are_one_line_with_the_place(source, message):
    with pytest.raises(BadImage, match=message) as error:
        open_image(source, "documents.parquet, row 3")
    assert str(error.value).startswith("documents.parquet, row 3: ")
    assert "\n" not in str(error.value)


def test_a_folder_is_not_a_picture(tmp_path):
    with pytest.raises(BadImage, match="cannot be read"):
        open_image(tmp_path, "x")


def test_the_limit_is_on_pixels_not_on_bytes():
    with pytest.raises(BadImage, match="over 31 pixels"):
        open_image(half_and_half(), "x", MediaLimits(pixels=31))
    assert open_image(half_and_half(), "x", MediaLimits(pixels=32)).size == (8, 4)


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (9, 300), (33, 31), (640, 480)])
@pytest.mark.parametrize("pixels", [(4096, 4096), (1024, 65_536)])
def test_patches_are_those_of_transformers(tiny_base, tmp_path, size, pixels):
    folder = shutil.copytree(tiny_base, tmp_path / "scaled")
    config = json.loads((folder / CONFIG).read_text())
    config |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / CONFIG).write_text(json.dumps(config))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(
        folder, size={"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    )
    form = PictureFormat.from_pretrained(folder, ModelSettings(min_pixels=pixels[0], max_pixels=pixels[1]))
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    shown = [Image.fromarray(noise), half_and_half()]
    ours, expected = [read_picture(image, form, "x") for image in shown], theirs(images=shown, return_tensors="np")
    assert np.array_equal([picture.grid for picture in ours], expected["image_grid_thw"])
    pixels = [picture.pixels for picture in ours]
    assert {array.dtype for array in pixels} == {np.dtype(np.uint8)}
    np.testing.assert_allclose(form.scale(pixels).numpy(), expected["pixel_values"], atol=2e-6)


def form_of(pixels: tuple[int, int]) -> PictureFormat:
    return PictureFormat(14, 2, *pixels, 4, 10**6, 3, PixelScale(1 / 255, (0.5,) * 3, (0.5,) * 3, 14, 2))


@given(st.integers(15, 5000), st.integers(15, 5000), st.sampled_from([(784, 784), (3136, 235_200), (100, 10**7)]))
def test_sizes_are_those_of_transformers(height, width, pixels):
    form = form_of(pixels)
    try:
        expected = smart_resize(height, width, 28, *pixels)
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio over 200"):
            form.size(height, width)
    else:
        assert form.size(height, width) == expected


@pytest.mark.parametrize("height", [1, 10, 14])
def test_a_short_side_is_one_merged_patch_before_areas_are_compared(height):
    """As in the reference and its peers; transformers rounds it to none, finds the area too small and enlarges."""
    assert form_of((3136, 235_200)).size(height, 200) == (28, 196)
    assert form_of((3136, 235_200)).size(200, height) == (196, 28)


def test_a_preparation_may_leave_exif_and_transparency_alone(tmp_path):
    turned, clear = Image.Exif(), Image.new("RGBA", (8, 4), (*RED, 0))
    turned[0x0112] = 6
    photo = encoded(half_and_half(), "JPEG", exif=turned)
    assert (open_image(photo, "x").size, open_image(photo, "x", upright=False).size) == ((4, 8), (8, 4))
    assert open_image(clear, "x").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(clear, "x", on_white=False).getpixel((0, 0)) == RED
    settings = ModelSettings(preparation=Preparation(upright=False, transparency="dropped"))
    (tmp_path / CONFIG).write_text(json.dumps(QWEN3VL_PICTURES))
    form = PictureFormat.from_pretrained(tmp_path, settings)
    assert read_picture(photo, form, "x").grid == (1, 4, 6)
    assert set(map(tuple, read_picture(clear, form, "x").pixels.reshape(-1, 3, 256)[0].T)) == {RED}


def test_a_preparation_makes_squares_and_keeps_the_directorys_budget(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps(QWEN3VL_PICTURES | {"max_pixels": 128 * 128, "min_pixels": 1}))

    def grid(size: tuple[int, int], **preparation) -> tuple[int, int, int]:
        settings = ModelSettings(min_pixels=1, max_pixels=10**6, preparation=Preparation(**preparation))
        return read_picture(Image.new("RGB", size), PictureFormat.from_pretrained(tmp_path, settings), "x").grid

    assert grid((320, 160)) == (1, 10, 20)
    assert grid((320, 160), square=192) == (1, 12, 12)
    assert grid((320, 160), square=192, own_budget=True) == (1, 8, 8)
    assert grid((320, 31), tiny=64) == (1, 4, 4)
    assert grid((320, 32), tiny=64) == (1, 2, 20)
    assert grid((320, 160), first_budget=(1, 56 * 56)) == (1, 2, 4)  # 84 × 28 first


def test_the_reference_resizes_twice(tmp_path):
    """As the reference does (docs/method.md#picture-resizing): to multiples of 28 within its own budget, then as the
    checkpoint's processor says (here Qwen3-VL's)."""
    size = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    (tmp_path / CONFIG).write_text(json.dumps(QWEN3VL_PICTURES | {"size": size}))
    form = PictureFormat.from_pretrained(tmp_path, REFERENCE)
    shown = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 200, 3), dtype=np.uint8))
    first = smart_resize(90, 200, 28, 3136, 235_200)
    second = smart_resize(*first, 32, 65_536, 16_777_216)
    assert first != second
    twice = np.asarray(
        shown.resize(first[::-1], Image.Resampling.BICUBIC).resize(second[::-1], Image.Resampling.BICUBIC)
    )
    ours = read_picture(shown, form, "x")
    assert ours.grid == (1, second[0] // 16, second[1] // 16)
    corner = ours.pixels[0].reshape(3, 16, 16).transpose(1, 2, 0)
    assert np.array_equal(corner, twice[:16, :16])


@pytest.mark.parametrize("text", [None, "[]", "{", "{}"])
def test_a_checkpoint_without_a_usable_picture_config_is_a_users_error(tiny_base, tmp_path, text):
    folder = shutil.copytree(tiny_base, tmp_path / "broken")
    (folder / CONFIG).unlink() if text is None else (folder / CONFIG).write_text(text)
    with pytest.raises(UserError, match=f"{CONFIG}: (cannot be read|no 'patch_size')"):
        ItemEncoder.from_pretrained(folder, ModelSettings())


def test_picture_keys_differ_by_content_and_shape():
    gray = [Image.new("RGB", size, "gray") for size in ((32, 128), (128, 32), (64, 64), (64, 64))]
    keys = [read_picture(picture, form_of((256, 65_536)), "x").key for picture in gray]
    assert len(set(keys)) == 3
    assert keys[2] == keys[3]


def test_a_picture_shared_by_items_may_be_opened_by_many_threads():
    """PIL reads a file when pixels are first needed; threads that do so at once would break each other's stream."""
    pixels = np.random.default_rng(0).integers(0, 255, (900, 700, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels))
    for _ in range(3):
        shared = Image.open(io.BytesIO(data))
        with ThreadPoolExecutor(8) as threads:
            opened = list(threads.map(open_image, [shared] * 8, ["item"] * 8))
        assert all(np.array_equal(np.asarray(picture), pixels) for picture in opened)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "AVIF", "TIFF", "JPEG2000", "PPM"])
def test_a_picture_is_shown_as_what_browsers_know(kind, tmp_path):
    """Bytes, a path and a data URI alike; the type that is named is the type that it has."""
    data = encoded(half_and_half(), kind)
    (tmp_path / "a.bin").write_bytes(data)
    uri = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    for image in (data, str(tmp_path / "a.bin"), tmp_path / "a.bin", uri, [uri], bytearray(data)):
        [shown] = picture_uris(image)
        head, _, body = shown.partition(";base64,")
        shown = Image.open(io.BytesIO(base64.b64decode(body)))
        assert head == f"data:image/{shown.format.lower()}"
        assert shown.format == (kind if kind not in ("TIFF", "JPEG2000", "PPM") else "PNG")
    [shown] = picture_uris(half_and_half())
    assert shown.startswith("data:image/png;")


@pytest.mark.parametrize(
    "image", ["gone.png", "data:image/png;base64,?", "https://a.org/b.png", b"no picture", b"", "a\0", 7]
)
def test_a_picture_that_cannot_be_shown_is_left_out_with_a_line(image, capsys):
    assert picture_uris(image, "d7") == []
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("d7: not shown (")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
@pytest.mark.parametrize("white", [1, 255, 65_535, 1_000_000])
def test_gray_of_32_bits_is_scaled_to_its_white(dtype, white):
    if dtype == np.int32 and white == 1:
        return
    data = encoded(Image.fromarray(np.array([[0, white], [white / 5, -white]]).astype(dtype)), "TIFF")
    opened = np.asarray(open_image(data, "x"))[..., 0]
    assert opened.tolist() == [[0, 255], [51, 0]]


def test_of_several_pictures_all_are_shown(tmp_path):
    first, second = encoded(half_and_half()), encoded(half_and_half().rotate(90))
    (tmp_path / "a.png").write_bytes(first)
    assert picture_uris(None) == picture_uris([]) == []
    assert picture_uris([str(tmp_path / "a.png"), b"no picture", second]) == picture_uris(first) + picture_uris(second)
