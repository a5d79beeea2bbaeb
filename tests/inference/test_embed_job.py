"""Bulk embedding loses nothing (rule 8): bad rows are quarantined, a restart does only what is missing."""

import io
import os
import signal
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from tests.support.tiny_run import make_corpus
from umarvel_ray.data.content import digest_of_table
from umarvel_ray.data.tables import item_of
from umarvel_ray.errors import UserError
from umarvel_ray.inference.cached_embedder import CachedEmbedder
from umarvel_ray.inference.embed import EmbedderGroup, embed_table
from umarvel_ray.inference.embeddings import read_embeddings
from umarvel_ray.inference.shards import read_manifest, shard_path
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.pipeline import Pools, embed
from umarvel_ray.recipe import Cluster, Compute, Data, ModelSettings, load_recipe
from umarvel_ray.runs import Run
from umarvel_ray.search import Corpus

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096, max_text_tokens=96)
ENGINE = Compute(dtype="float32", token_budget=1024)
CLUSTER = Cluster(embedders=2, cpus_per_embedder=0.5, gpus_per_embedder=0)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def documents(count: int) -> pa.Table:
    """Texts, pictures and both in turn."""
    rows = [
        {
            "id": f"d{i}",
            "text": None if i % 3 == 1 else f"a boat and {'harbour lights ' * (i % 7)}{i}",
            "image": None if i % 3 == 0 else picture(i % 11),
        }
        for i in range(count)
    ]
    return pa.Table.from_pylist(rows, pa.schema([("id", pa.string()), ("text", pa.string()), ("image", pa.binary())]))


def with_image(table: pa.Table, row: int, image: bytes) -> pa.Table:
    images = table["image"].to_pylist()
    images[row] = image
    return table.set_column(2, "image", pa.array(images, pa.binary()))


def plain(base, rows: Sequence[dict], side: str = "document") -> np.ndarray:
    """The library's embedder, one item at a time: no cache, no padding, no Ray."""
    embedder = Embedder.from_pretrained(base, settings=SETTINGS)
    encode = embedder.encode_query if side == "query" else embedder.encode_document
    return np.concatenate([encode([item_of(row)]) for row in rows])


@pytest.fixture(scope="module")
def pool(ray_cluster):
    with EmbedderGroup(CLUSTER, ENGINE) as pool:
        yield pool


def test_equals_the_library_and_reconciles(pool, tiny_base, tmp_path):
    table = documents(70)
    table = with_image(table, 4, table["image"][4].as_py()[:300])  # truncated
    table = with_image(table, 32, b"not a picture")
    found = embed_table(pool, table, "document", tmp_path / "out", tiny_base, settings=SETTINGS, shard_rows=16)
    good = [row for row in table.to_pylist() if row["id"] not in {"d4", "d32"}]
    assert found.ids == [row["id"] for row in good]
    assert np.abs(found.vectors - plain(tiny_base, good)).max() < 1e-5
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [row["id"] for row in quarantine] == ["d4", "d32"]
    assert all(row["id"] in row["reason"] for row in quarantine)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["rows"], manifest["written"], manifest["quarantined"], manifest["shards"]) == (70, 68, 2, 5)
    embedding = pq.read_schema(shard_path(tmp_path / "out", 0)).field("embedding").type
    assert embedding == pa.list_(pa.float32(), found.vectors.shape[1])


def test_restart_does_only_what_is_missing(pool, tiny_base, tmp_path):
    table, out = documents(40), tmp_path / "out"
    first = embed_table(pool, table, "document", out, tiny_base, settings=SETTINGS, shard_rows=8)
    (out / "manifest.json").write_text((out / "manifest.json").read_text().replace("true", "false"))
    shard_path(out, 2).unlink()
    before = {index: shard_path(out, index).stat().st_mtime_ns for index in (0, 1, 3, 4)}
    with pytest.raises(UserError, match="no complete manifest"):
        read_embeddings(out)
    second = embed_table(pool, table, "document", out, tiny_base, settings=SETTINGS, shard_rows=8)
    assert {index: shard_path(out, index).stat().st_mtime_ns for index in before} == before
    assert second.ids == first.ids
    assert np.abs(second.vectors - first.vectors).max() < 1e-6


def test_other_rows_settings_or_side_start_anew(pool, tiny_base, tmp_path):
    table, out = documents(12), tmp_path / "out"
    base = embed_table(pool, table, "document", out, tiny_base, settings=SETTINGS, shard_rows=4)
    last = SETTINGS.model_copy(update={"pooling": "last"})
    other = embed_table(pool, table, "document", out, tiny_base, settings=last, shard_rows=4)
    assert np.abs(other.vectors - base.vectors).max() > 1e-2
    changed = with_image(table, 1, picture(99))
    third = embed_table(pool, changed, "document", out, tiny_base, settings=last, shard_rows=4)
    differs = np.abs(third.vectors - other.vectors).max(axis=1) > 1e-4
    assert np.flatnonzero(differs).tolist() == [1]


def test_a_finished_job_starts_no_actor(tiny_base, tmp_path, pool):
    table = documents(6)
    first = embed_table(pool, table, "document", tmp_path, tiny_base, settings=SETTINGS)
    with EmbedderGroup(CLUSTER, ENGINE) as idle:
        again = embed_table(idle, table, "document", tmp_path, tiny_base, settings=SETTINGS)
        assert idle._actors == []
    assert np.array_equal(first.vectors, again.vectors)


def test_a_killed_actor_is_restarted_and_nothing_is_lost(pool, tiny_base, tmp_path, monkeypatch):
    table = documents(60)
    killed = []
    run = pool.run

    def sabotaged(jobs, submit):
        def submit_after_murder(actor, index):
            if index == 3 and not killed:
                killed.append(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))
                os.kill(killed[0], signal.SIGKILL)
            return submit(actor, index)

        return run(jobs, submit_after_murder)

    monkeypatch.setattr(pool, "run", sabotaged)
    found = embed_table(pool, table, "document", tmp_path, tiny_base, settings=SETTINGS, shard_rows=8)
    assert killed
    assert found.ids == table["id"].to_pylist()
    assert np.abs(found.vectors - plain(tiny_base, table.to_pylist())).max() < 1e-5


def test_a_released_checkpoint_embeds_a_corpus_in_a_shorter_dimension(pool, tiny_base, tmp_path):
    """`embed` with all its keys; what is built from the vectors cuts queries alike."""
    data = make_corpus(tmp_path / "data")
    given = [
        f"output={tmp_path / 'run'}",
        f"data.root={data}",
        f"embed.checkpoint={tiny_base}",
        "embed.preset=reference",
    ]
    documents = pq.read_table(data / "documents.parquet").to_pylist()
    embedder = Embedder.from_pretrained(tiny_base, preset="reference")
    whole = embedder.encode_document([item_of(row) for row in documents])
    folder = tmp_path / "run" / "embeddings" / "documents"
    for dimension in (None, 8):
        keys = given if dimension is None else [*given, f"embed.truncate_dim={dimension}"]
        embed(Run.open(load_recipe("demo", keys)), Pools(pool, None))
        ids, vectors = read_embeddings(folder)
        expected = whole[:, :dimension] / np.linalg.norm(whole[:, :dimension], axis=1, keepdims=True)
        assert ids == [row["id"] for row in documents]
        assert np.abs(vectors - expected).max() < 1e-5
        assert read_manifest(folder)["dimension"] == expected.shape[1]
    [query] = embedder.encode_query(["a blue bird"])
    cosines = expected @ query[:8] / np.linalg.norm(query[:8])
    hits = Corpus.open(folder, Data(root=str(data))).search(query, 3)
    assert [hit.document["id"] for hit in hits] == [ids[row] for row in np.argsort(-cosines)[:3]]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1][:3], atol=1e-5)
    with pytest.raises(UserError, match="truncate_dim is 64; give 1 to 32"):
        embed(Run.open(load_recipe("demo", [*given, "embed.truncate_dim=64"])), Pools(pool, None))


def test_bad_checkpoint_and_empty_table_are_one_line(pool, tmp_path):
    with pytest.raises(UserError, match="no rows"):
        embed_table(pool, documents(0), "document", tmp_path, tmp_path, settings=SETTINGS)
    with pytest.raises(UserError, match="no config"):
        embed_table(pool, documents(3), "document", tmp_path, tmp_path / "nowhere", settings=SETTINGS)


def test_cache_never_changes_a_vector(tiny_base):
    """Second pass, other side, forgotten items: always what the plain embedder says."""
    rows = documents(30).to_pylist()
    expected = plain(tiny_base, rows)
    for cache_bytes in (0, 20_000, 2**30):
        cached = CachedEmbedder("cpu", "float32", 1024, 1, cache_bytes)
        cached.load(tiny_base, SETTINGS)
        for _ in range(2):
            ids, vectors, quarantined = cached.embed(rows, "document")
            assert ids == [row["id"] for row in rows]
            assert quarantined == []
            assert np.abs(vectors - expected).max() < 1e-5
        queries = [row | {"instruction": "Find an image."} for row in rows]
        assert np.abs(cached.embed(queries, "query")[1] - plain(tiny_base, queries, "query")).max() < 1e-5


def test_cache_forgets_when_the_tower_changes(tiny_base, tmp_path):
    from tests.support.tiny import make_tiny_base

    other = make_tiny_base(tmp_path / "other", seed=1)
    rows = documents(9).to_pylist()
    cached = CachedEmbedder("cpu", "float32", 1024, 1, 2**30)
    for base in (tiny_base, other, tiny_base):
        cached.load(base, SETTINGS)
        assert np.abs(cached.embed(rows, "document")[1] - plain(base, rows)).max() < 1e-5


def test_digest_sees_values_not_chunks():
    table = documents(9)
    pieces = pa.concat_tables([table.slice(0, 4), table.slice(4)])
    assert digest_of_table(pieces) == digest_of_table(table)
    assert digest_of_table(with_image(table, 1, b"x")) != digest_of_table(table)
