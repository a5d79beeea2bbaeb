"""The embedder that caches across checkpoints, against the library's embedder."""

import numpy as np
import pytest

from tests.support.embedding_tables import SETTINGS, embed_singly, make_documents
from tests.support.small_dataset import noise_picture
from tests.support.tiny import make_tiny_base
from umarvel_ray.errors import UserError
from umarvel_ray.inference.cached_embedder import CachedEmbedder
from umarvel_ray.model.checkpoint import CheckpointRef


def test_cache_never_changes_a_vector(tiny_base):
    """On a second pass, on the other side and for evicted items, vectors equal those of the library's embedder."""
    rows = make_documents(30).to_pylist()
    expected = embed_singly(tiny_base, rows)
    for cache_bytes in (0, 20_000, 2**30):
        cached = CachedEmbedder("cpu", "float32", 1024, 1, cache_bytes)
        cached.load(CheckpointRef.of(tiny_base, SETTINGS))
        for _ in range(2):
            ids, vectors, quarantined = cached.embed(rows, "document")
            assert ids == [row["id"] for row in rows]
            assert quarantined == []
            assert np.abs(vectors - expected).max() < 1e-5
        queries = [row | {"instruction": "Find an image."} for row in rows]
        assert np.abs(cached.embed(queries, "query")[1] - embed_singly(tiny_base, queries, "query")).max() < 1e-5


def test_lists_of_pictures_are_embedded_and_cached(tiny_base):
    first, second = noise_picture(0), noise_picture(1)
    rows = [
        {"id": str(number), "text": None, "image": shown}
        for number, shown in enumerate([[first, second], [second, first], [first], first])
    ]
    cached = CachedEmbedder("cpu", "float32", 1024, 1, 2**30)
    cached.load(CheckpointRef.of(tiny_base, SETTINGS))
    for _ in range(2):
        _, vectors, quarantined = cached.embed(rows, "document")
        assert quarantined == []
        assert np.abs(vectors - embed_singly(tiny_base, rows)).max() < 1e-5
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_cache_is_cleared_when_the_tower_changes(tiny_base, tmp_path):
    other = make_tiny_base(tmp_path / "other", seed=1)
    rows = make_documents(9).to_pylist()
    cached = CachedEmbedder("cpu", "float32", 1024, 1, 2**30)
    for base in (tiny_base, other, tiny_base):
        cached.load(CheckpointRef.of(base, SETTINGS))
        assert np.abs(cached.embed(rows, "document")[1] - embed_singly(base, rows)).max() < 1e-5


def test_a_checkpoint_is_loaded_again_after_another_one_failed(tiny_base, tmp_path):
    rows, ref = make_documents(3).to_pylist(), CheckpointRef.of(tiny_base, SETTINGS)
    cached = CachedEmbedder("cpu", "float32", 1024, 1, 2**30)
    cached.load(ref)
    expected = cached.embed(rows, "document")[1]
    with pytest.raises(UserError, match="no config"):
        cached.load(CheckpointRef(str(tmp_path / "gone"), SETTINGS, "another"))
    cached.load(ref)
    assert np.array_equal(cached.embed(rows, "document")[1], expected)


def test_a_gpu_that_is_not_there_is_named_in_one_line(tiny_base, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cached = CachedEmbedder("cuda", "float32", 1024, 1, 0)
    with pytest.raises(UserError, match=r"device cuda: PyTorch .* sees no GPU on"):
        cached.load(CheckpointRef.of(tiny_base, SETTINGS))
