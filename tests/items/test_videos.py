"""Videos as items: frames, patches, tokens and positions of each family, compared with transformers."""

import io

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from umarvel_ray.errors import UserError
from umarvel_ray.items.videos import BadVideo, open_video, spread
from umarvel_ray.model import umarvel_embedding
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.recipe import ModelSettings

SETTINGS = ModelSettings(min_pixels=256, max_pixels=4096, video_frames=6, max_video_pixels=6 * 1024)


def film(frames: int = 10, size: tuple[int, int] = (64, 48), fps: int = 5, kind: str = "mp4") -> bytes:
    """A video whose frame n is gray of brightness 20 n."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for n in range(frames):
            gray = np.full((size[1], size[0], 3), 20 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def brightness(frames: list[Image.Image]) -> list[int]:
    return [round(np.asarray(frame).mean() / 20) for frame in frames]


def test_frames_are_spread_over_the_whole_video(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(film())
    for source in (film(), path, str(path)):
        video = open_video(source, 4, "x")
        assert brightness(video.frames) == [0, 3, 6, 9]
        assert video.seconds == pytest.approx([0.0, 0.6, 1.2, 1.8])
    assert brightness(open_video(film(3), 8, "x").frames) == [0, 1, 2]


def test_frames_at_a_rate():
    """Two seconds at 5 frames a second: 2 a second are 4; an even number; within the limit, and what there is."""
    for fps, limit, expected in (
        (2.0, 768, 4),
        (3.5, 768, 6),
        (0.1, 768, 4),
        (100.0, 768, 10),
        (4.0, 6, 6),
        (4.0, 5, 4),
    ):
        found = open_video(film(), limit, "x", fps=fps)
        assert len(found.frames) == expected
        assert brightness(found.frames)[0 :: expected - 1] == [0, 9]
        assert len(umarvel_embedding.open_video(film(), limit, fps)[0]) == expected
    assert len(open_video(film(3), 768, "x", fps=2.0).frames) == 2
    assert len(open_video(film(1), 768, "x", fps=2.0).frames) == 1
    pictures = [Image.new("RGB", (32, 32))] * 9  # a second each
    assert len(open_video(pictures, 768, "x", fps=0.7).frames) == 6


def test_a_video_that_no_model_reads_is_bad():
    with pytest.raises(BadVideo, match="x: aspect ratio over 200: 512 × 2 pixels"):
        open_video(film(2, (512, 2)), 1, "x")


def test_frames_of_a_stream_that_changes_its_size_are_as_large_as_the_first(embedder):
    changing = film(4, (64, 48), kind="mpegts") + film(4, (32, 96), kind="mpegts")
    assert {frame.size for frame in open_video(changing, 8, "x").frames} == {(64, 48)}
    assert np.isfinite(embedder.encode({"video": changing})).all()


@given(st.integers(1, 500), st.integers(1, 40))
def test_a_spread_is_even_and_includes_both_ends(count, limit):
    chosen = spread(count, limit)
    assert len(set(chosen)) == len(chosen) == min(count, limit)
    assert chosen[0] == 0
    assert limit == 1 or chosen[-1] == count - 1
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"hello", "cannot be read"),
        (film()[:400], "cannot be read"),
        ("nowhere.mp4", "nowhere.mp4 not found"),
        ("https://example.org/a.mp4", "not fetched"),
        ([], "no frame"),
        (3.5, "not float"),
    ],
    ids=lambda value: repr(value)[:16],
)
def test_bad_videos_are_one_line_with_the_place(source, message):
    with pytest.raises(BadVideo, match=message) as error:
        open_video(source, 4, "documents.parquet, row 3")
    assert str(error.value).startswith("documents.parquet, row 3: ")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def embedder(family_base) -> Embedder:
    return Embedder.from_pretrained(family_base, settings=SETTINGS)


def test_a_video_of_one_still_has_the_patches_of_that_still(embedder):
    """Every frame group of a video without motion has the patches of the still."""
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    still = embedder.encoder.pictures({"image": picture}, "x")
    moving = embedder.encoder.pictures({"video": [picture] * 4}, "x")
    assert [still[0].grid, moving[0].grid] == [(1, 4, 4), (2, 4, 4)]
    expected = embedder.model.scale([still[0].pixels]).repeat(2, 1)
    torch.testing.assert_close(embedder.model.scale([moving[0].pixels]), expected, atol=0, rtol=0)
    together = embedder.model.scale([still[0].pixels, moving[0].pixels])
    torch.testing.assert_close(together, expected[:16].repeat(3, 1), atol=0, rtol=0)


def test_a_frame_group_holds_its_frames_in_order(embedder):
    frames = [Image.new("RGB", (32, 32), (n, n, n)) for n in (10, 20, 30)]
    (video,) = embedder.encoder.pictures({"video": frames}, "x")
    assert video.grid == (2, 4, 4)  # the third frame is repeated
    assert video.seconds == (0.5, 2.0)
    by_group = video.pixels.reshape(2, 16, 3, 2, 64)
    assert by_group[:, 0, 0, :, 0].tolist() == [[10, 20], [30, 30]]
    assert (by_group == by_group[:, :1, :1, :, :1]).all()


def test_the_pixel_budget_is_for_all_frames(embedder):
    (video,) = embedder.encoder.pictures({"video": [Image.new("RGB", (640, 480))] * 6}, "x")
    groups, rows, columns = video.grid
    assert 2 * groups * rows * columns * 64 <= SETTINGS.max_video_pixels
    assert rows * columns * 64 > 500


def test_vectors_are_those_of_the_stock_model(family_base, embedder):
    """transformers' own forward on the same tokens: its tower, its M-RoPE for videos, its DeepStack."""
    item = {"video": [Image.effect_noise((48, 32), 60).convert("RGB") for _ in range(4)], "text": "boats"}
    encoded = embedder.encoder.encode(item, "document")
    core = embedder.model.backbone.model
    ids = torch.from_numpy(encoded.input_ids).long()[None]
    (video,) = encoded.pictures
    extra = {"second_per_grid_ts": torch.tensor([2.0])} if core.config.model_type == "qwen2_5_vl" else {}
    with torch.no_grad():
        states = core(
            input_ids=ids,
            pixel_values_videos=embedder.model.scale([video.pixels]),
            video_grid_thw=torch.tensor([video.grid]),
            mm_token_type_ids=2 * (ids == core.config.video_token_id).int(),
            attention_mask=torch.ones_like(ids),
            **extra,
        ).last_hidden_state[0]
    mean = states.mean(0)
    ours = embedder.encode_document([item])[0]
    np.testing.assert_allclose(ours, (mean / mean.norm()).numpy(), atol=1e-5)
    backwards = embedder.encode_document([item | {"video": item["video"][::-1]}])[0]
    assert np.abs(ours - backwards).max() > 1e-3


def test_qwen3_writes_the_time_of_each_frame_group(family_base, embedder):
    encoded = embedder.encoder.encode({"video": [Image.new("RGB", (32, 32))] * 3}, "document")
    text = embedder.encoder.tokenizer.decode(encoded.input_ids)
    run = "<|video_pad|>" * 4
    if embedder.encoder.family.timestamps:
        video = "".join(f"<{t} seconds><|vision_start|>{run}<|vision_end|>" for t in ("0.5", "2.0"))
    else:
        video = f"<|vision_start|>{2 * run}<|vision_end|>"
    assert text.startswith(f"<|im_start|>user\n{video}<|im_end|>")


def test_other_items_of_a_batch_change_nothing(embedder):
    noise = [Image.effect_noise((32, 32), 60).convert("RGB") for _ in range(4)]
    items = [{"video": noise}, {"image": noise[0], "video": noise[:2], "text": "a fox"}, "yes", {"image": noise[1]}]
    together = embedder.encode_document(items)
    alone = np.concatenate([embedder.encode_document([item]) for item in items])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_an_item_with_a_bad_video_is_named(embedder):
    with pytest.raises(UserError, match=r"^document 1: video cannot be read"):
        embedder.encode_document(["fine", {"video": b"hello"}])
