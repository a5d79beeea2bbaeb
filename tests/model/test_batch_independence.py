"""An item's embedding does not depend on the other items in its batch, to 1e-5, for every backbone family."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from umarvel_ray.model.batch import collate, token_buckets
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.vision_cache import VisionCache
from umarvel_ray.recipe import ModelSettings


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ITEMS = [
    {"text": "a red fox crosses the snow", "instruction": "find an image that matches the caption"},
    {"text": "yes"},
    {"image": picture(0)},
    {"image": picture(1), "text": "two boats near a pier", "instruction": "find the same"},
    {"image": [picture(2, 128, 64), picture(0)], "text": "both"},
    {"text": "the flag of a country with three stripes and a yellow star " * 4},
    {"image": picture(1)},
]

# Every pair of values occurs together; each family runs all four.
SETTINGS = [
    {"attention": "bidirectional", "pooling": "mean", "positions": "mrope"},
    {"attention": "bidirectional", "pooling": "last", "positions": "sequential"},
    {"attention": "causal", "pooling": "mean", "positions": "sequential"},
    {"attention": "causal", "pooling": "last", "positions": "mrope"},
]


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda s: "-".join(s.values()))
def embedder(request, family_base) -> Embedder:
    return Embedder.from_pretrained(
        family_base, settings=ModelSettings(min_pixels=4096, max_pixels=8192, **request.param)
    )


@pytest.fixture(scope="module")
def plain(tiny_base) -> Embedder:
    return Embedder.from_pretrained(tiny_base, settings=ModelSettings(min_pixels=4096, max_pixels=8192))


def embed(embedder: Embedder, items: list) -> np.ndarray:
    """All in one batch."""
    with torch.inference_mode():
        encoded = [embedder.encoder.encode(item, "query") for item in items]
        return embedder.model(collate(encoded)).numpy()


def test_alone_and_in_a_padded_batch_are_the_same(embedder):
    together = embed(embedder, ITEMS)
    alone = np.concatenate([embed(embedder, [item]) for item in ITEMS])
    np.testing.assert_allclose(alone, together, atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    cosines = together @ together.T - 2 * np.eye(len(ITEMS))
    assert cosines.max() < 0.9999, "the items must differ for this test to mean anything"


def test_an_unpadded_batch_equals_a_padded_one(embedder):
    """Without padding, the reference turns causal (docs/method.md#causal-without-padding)."""
    same_length = [{"text": "a red fox"}] * 2 + [{"text": "a red fox"}]
    longer = embed(embedder, [*same_length, ITEMS[5]])
    np.testing.assert_allclose(embed(embedder, same_length), longer[:3], atol=1e-5, rtol=0)


def test_order_and_budget_do_not_matter(plain):
    together = embed(plain, ITEMS)
    for seed, budget in itertools.product(range(3), (1, 100, 10_000)):
        order = random.Random(seed).sample(range(len(ITEMS)), len(ITEMS))
        shuffled = plain.encode_query([ITEMS[i] for i in order], token_budget=budget)
        np.testing.assert_allclose(shuffled, together[order], atol=1e-5, rtol=0)


def test_the_content_of_padding_does_not_matter(plain):
    encoded = [plain.encoder.encode(item, "query") for item in ITEMS]
    batches = [collate(encoded, pad=pad) for pad in (0, 77)]
    with torch.inference_mode():
        torch.testing.assert_close(plain.model(batches[0]), plain.model(batches[1]), atol=1e-6, rtol=0)


def test_text_only_batches_never_run_the_tower(plain):
    def fail(*_):
        raise AssertionError("the vision tower ran")

    handle = plain.model.backbone.model.visual.register_forward_pre_hook(fail)
    try:
        embed(plain, [ITEMS[0], ITEMS[1]])
        with pytest.raises(AssertionError):
            embed(plain, [ITEMS[0], ITEMS[2]])
    finally:
        handle.remove()


def test_cached_features_equal_the_towers_output(plain):
    batch = collate([plain.encoder.encode(item, "query") for item in ITEMS])
    keys = [picture.key for picture in batch.pictures]
    assert len(set(keys)) == 3 < len(keys)
    with torch.no_grad():
        features = plain.model.run_tower(batch.pictures)
    assert [tuple(f.shape) for f in features] == [(16, 32), (16, 32), (32, 32), (16, 32), (16, 32)]
    with torch.inference_mode():
        tower = plain.model(batch)
        assert torch.equal(plain.model(batch, visual=dict(zip(keys, features, strict=True))), tower)
        cache = VisionCache(max_bytes=2**20)
        torch.testing.assert_close(plain.model(batch, visual=cache.features(plain.model, batch.pictures)), tower)


def test_the_cache_runs_the_tower_once_per_picture_and_stays_within_its_bound(plain):
    items = [{"image": picture(seed)} for seed in (10, 11, 12, 10)]
    batch = collate([plain.encoder.encode(item, "document") for item in items])
    seen = []
    handle = plain.model.backbone.model.visual.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    try:
        one_picture = 16 * 32 * 4
        cache = VisionCache(max_bytes=3 * one_picture)
        first = cache.features(plain.model, batch.pictures)
        again = cache.features(plain.model, batch.pictures)
        assert seen == [3]
        assert all(torch.equal(first[key], again[key]) for key in first)
        small = VisionCache(max_bytes=2 * one_picture)
        assert len(small.features(plain.model, batch.pictures)) == 3
        assert len(small) == 2
        assert small.nbytes == 2 * one_picture
    finally:
        handle.remove()


def test_buckets_hold_every_index_once_within_the_budget():
    rng = np.random.default_rng(0)
    for budget in (1, 50, 300, 5000):
        lengths = rng.integers(1, 200, 100).tolist()
        buckets = token_buckets(lengths, budget)
        assert sorted(i for bucket in buckets for i in bucket) == list(range(100))
        for bucket in buckets:
            size = max(lengths[i] for i in bucket) * len(bucket)
            assert len(bucket) == 1 or size <= budget
            assert size - sum(lengths[i] for i in bucket) <= budget / 32
    assert token_buckets([], 10) == []
    assert token_buckets([12, 100, 11, 96], 1024) == [
        [1, 3],
        [0, 2],
    ]  # as one batch, 181 of 400 tokens would be padding
