"""Bulk embedding loses nothing: bad rows are quarantined, and a restart computes only what is missing."""

import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from tests.support.embedding_tables import SETTINGS, embed_singly, make_documents, picture, stored, with_image
from tests.support.tiny_run import make_corpus
from umarvel_ray.data.dataset import item_of
from umarvel_ray.errors import UserError
from umarvel_ray.index import Corpus
from umarvel_ray.inference.embed import EmbedderGroup, embed_table
from umarvel_ray.inference.embeddings import read_embeddings
from umarvel_ray.inference.shards import read_manifest, shard_path
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.pipeline import Actors, embed
from umarvel_ray.recipe import Cluster, Compute, Data, load_recipe
from umarvel_ray.runs import Run


def embedded(embedders, table, folder, ref, shard_rows=None):
    """Embed a table in memory, and read the embeddings back."""
    embed_table(embedders, stored(table, folder.parent), "document", folder, ref, shard_rows=shard_rows)
    return read_embeddings(folder)


COMPUTE = Compute(dtype="float32", token_budget=1024)
CLUSTER = Cluster(embedders=2, cpus_per_embedder=0.5, gpus_per_embedder=0)


@pytest.fixture(scope="module")
def embedders(ray_cluster):
    with EmbedderGroup(CLUSTER, COMPUTE) as embedders:
        yield embedders


@pytest.fixture(scope="module")
def ref(tiny_base):
    return CheckpointRef.of(tiny_base, SETTINGS)


def test_equals_the_library_and_reconciles(embedders, tiny_base, ref, tmp_path):
    table = make_documents(70)
    table = with_image(table, 4, table["image"][4].as_py()[:300])  # truncated
    table = with_image(table, 32, b"not a picture")
    found = embedded(embedders, table, tmp_path / "out", ref, shard_rows=16)
    good = [row for row in table.to_pylist() if row["id"] not in {"d4", "d32"}]
    assert found.ids == [row["id"] for row in good]
    assert np.abs(found.vectors - embed_singly(tiny_base, good)).max() < 1e-5
    quarantine = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert [row["id"] for row in quarantine] == ["d4", "d32"]
    assert all(row["id"] in row["reason"] for row in quarantine)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["rows"], manifest["written"], manifest["quarantined"], manifest["shards"]) == (70, 68, 2, 5)
    embedding = pq.read_schema(shard_path(tmp_path / "out", 0)).field("embedding").type
    assert embedding == pa.list_(pa.float32(), found.vectors.shape[1])


def test_a_restart_computes_only_missing_shards(embedders, tiny_base, ref, tmp_path):
    table, out = make_documents(40), tmp_path / "out"
    first = embedded(embedders, table, out, ref, shard_rows=8)
    (out / "manifest.json").write_text((out / "manifest.json").read_text().replace("true", "false"))
    shard_path(out, 2).unlink()
    before = {index: shard_path(out, index).stat().st_mtime_ns for index in (0, 1, 3, 4)}
    with pytest.raises(UserError, match="no complete manifest"):
        read_embeddings(out)
    second = embedded(embedders, table, out, ref, shard_rows=8)
    assert {index: shard_path(out, index).stat().st_mtime_ns for index in before} == before
    assert second.ids == first.ids
    assert np.abs(second.vectors - first.vectors).max() < 1e-6


def test_other_rows_or_settings_start_over(embedders, tiny_base, ref, tmp_path):
    table, out = make_documents(12), tmp_path / "out"
    base = embedded(embedders, table, out, ref, shard_rows=4)
    last = CheckpointRef.of(tiny_base, SETTINGS.model_copy(update={"pooling": "last"}))
    other = embedded(embedders, table, out, last, shard_rows=4)
    assert np.abs(other.vectors - base.vectors).max() > 1e-2
    changed = with_image(table, 1, picture(99))
    third = embedded(embedders, changed, out, last, shard_rows=4)
    differs = np.abs(third.vectors - other.vectors).max(axis=1) > 1e-4
    assert np.flatnonzero(differs).tolist() == [1]


def test_a_finished_job_starts_no_actor(embedders, ref, tmp_path):
    table = make_documents(6)
    first = embedded(embedders, table, tmp_path / "out", ref)
    with EmbedderGroup(CLUSTER, COMPUTE) as idle:
        again = embedded(idle, table, tmp_path / "out", ref)
        assert idle._actors == []
    assert np.array_equal(first.vectors, again.vectors)


def test_a_killed_actor_is_restarted_and_nothing_is_lost(embedders, tiny_base, ref, tmp_path, monkeypatch):
    table = make_documents(60)
    killed = []
    run = embedders.run

    def sabotaged(calls, submit):
        def kill_before_submit(actor, index):
            if index == 3 and not killed:
                killed.append(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())))
                os.kill(killed[0], signal.SIGKILL)
            return submit(actor, index)

        return run(calls, kill_before_submit)

    monkeypatch.setattr(embedders, "run", sabotaged)
    found = embedded(embedders, table, tmp_path / "out", ref, shard_rows=8)
    assert killed
    assert found.ids == table["id"].to_pylist()
    assert np.abs(found.vectors - embed_singly(tiny_base, table.to_pylist())).max() < 1e-5


def test_a_released_checkpoint_embeds_a_corpus_in_a_shorter_dimension(embedders, tiny_base, ref, tmp_path):
    """`embed` with all its keys; a corpus built from the vectors truncates queries to the same dimension."""
    data = make_corpus(tmp_path / "data")
    keys = [
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
        overrides = keys if dimension is None else [*keys, f"embed.truncate_dim={dimension}"]
        embed(Run.open(load_recipe("demo", overrides)), Actors(embedders, None, None))
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
        embed(Run.open(load_recipe("demo", [*keys, "embed.truncate_dim=64"])), Actors(embedders, None, None))


def test_bad_checkpoint_and_empty_table_are_one_line(embedders, ref, tmp_path):
    with pytest.raises(UserError, match="no rows"):
        embedded(embedders, make_documents(0), tmp_path / "out", ref)
    with pytest.raises(UserError, match="no config"):
        CheckpointRef.of(tmp_path / "nowhere", SETTINGS)
