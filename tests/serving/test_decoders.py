"""Pictures are decoded in processes that can be ended, and come out as the library reads them."""

import asyncio
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.items.test_videos import film
from umarvel_ray.errors import UserError
from umarvel_ray.items.limits import WEB_FORMATS, MediaLimits
from umarvel_ray.items.pictures import PictureFormat, read_pictures
from umarvel_ray.recipe import ModelSettings
from umarvel_ray.serving.decoders import Decoders
from umarvel_ray.serving.settings import Limits


@pytest.fixture(scope="module")
def form(tiny_base) -> PictureFormat:
    limits = MediaLimits(formats=WEB_FORMATS, pixels=2**25, only_bytes=True)
    return PictureFormat.from_pretrained(tiny_base, ModelSettings(min_pixels=4096, max_pixels=4096), limits)


def drawn(width: int = 64, height: int = 48, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGB").save(content, kind)
    return content.getvalue()


@pytest.fixture(scope="module")
def slow() -> bytes:
    """A picture that takes a second or more to decode."""
    content = io.BytesIO()
    Image.new("RGB", (5000, 5000), (1, 2, 3)).save(content, "WEBP", lossless=True, method=0)
    return content.getvalue()


def children() -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"PPid:\t{os.getpid()}\n" in (folder / "status").read_text()
            if ours and b"umarvel_ray.serving.decoder" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def end_all(decoders: Decoders) -> None:
    while not decoders._idle.empty():
        decoders._idle.get_nowait().end()


def run(work, **limits):
    """What `work(decoders)` returns; no process is left."""

    async def inner():
        decoders = Decoders(Limits(**limits))
        try:
            return await work(decoders)
        finally:
            end_all(decoders)

    result = asyncio.run(inner())
    assert not children()
    return result


def test_they_are_as_the_library_reads_them(form):
    items = [{"image": drawn()}, {"image": [drawn(30, 90), drawn(kind="JPEG")]}, {"video": film()}, {"text": "a"}]

    async def work(decoders):
        return await asyncio.gather(*(decoders.read(item, form, "item", decoders.budget()) for item in items))

    for found, item in zip(run(work), items, strict=True):
        expected = read_pictures(item, form, "item")
        assert [(one.grid, one.key, one.seconds) for one in found] == [(x.grid, x.key, x.seconds) for x in expected]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours.pixels, theirs.pixels)


def test_a_bad_picture_has_the_librarys_message(form):
    with pytest.raises(UserError) as expected:
        read_pictures({"image": drawn()[:60]}, form, "input[3]")

    async def work(decoders):
        with pytest.raises(UserError) as error:
            await decoders.read({"image": drawn()[:60]}, form, "input[3]", decoders.budget())
        return str(error.value)

    assert run(work) == str(expected.value)


def test_a_process_that_ends_is_one_items_error(form):
    async def work(decoders):
        budget = decoders.budget()
        await decoders.read({"image": drawn()}, form, "first", budget)
        [process] = children()
        os.kill(process, 9)
        with pytest.raises(UserError, match="second: decoding it failed"):
            await decoders.read({"image": drawn()}, form, "second", budget)
        return await decoders.read({"image": drawn()}, form, "third", budget)

    assert len(run(work)) == 1


def test_memory_is_limited(form, slow):
    async def work(decoders):
        budget = decoders.budget()
        with pytest.raises(UserError, match=r"large: decoding takes too much memory|large: .*MemoryError"):
            await decoders.read({"image": slow}, form, "large", budget)
        return await decoders.read({"image": drawn()}, form, "small", budget)

    assert len(run(work, decoder_bytes=400_000_000)) == 1


def test_a_request_has_so_much_time_and_others_have_theirs(form, slow):
    async def work(decoders):
        budget = decoders.budget()
        await decoders.read({"image": drawn()}, form, "warm", decoders.budget())
        budget.left = 0.05
        for where in ("a", "b"):
            with pytest.raises(UserError, match=f"{where}: to decode this request's pictures and videos takes over"):
                await decoders.read({"image": slow}, form, where, budget)
        return await decoders.read({"image": drawn()}, form, "c", decoders.budget())

    assert len(run(work)) == 1


def test_the_work_of_a_client_that_left_ends(form, slow):
    async def work(decoders):
        await decoders.read({"image": drawn()}, form, "warm", decoders.budget())
        before = children()
        reading = asyncio.create_task(decoders.read({"image": [slow] * 8}, form, "left", decoders.budget()))
        await asyncio.sleep(0.2)
        reading.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled()
        assert not before & children()
        return await decoders.read({"image": drawn()}, form, "next", decoders.budget())

    assert len(run(work)) == 1
