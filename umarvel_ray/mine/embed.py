"""Bulk embedding: a table of items to shards of vectors, on a pool of actors (rules 7 and 8).

    with EmbedderPool(recipe.cluster, recipe.engine) as pool:
        embeddings = embed_table(pool, dataset.documents, "document", run / "documents", checkpoint, "documents")

An actor does both halves of the work: its threads read, decode and tokenise the next rows while its device runs the
model. A Ray Data pool of separate preprocessing processes was tried on paper and left out: on two cores it adds two
processes of 400 MB and moves 100 KB of pixels per picture between them, and on a GPU node `cpus_per_embedder` threads
(Pillow and the tokenizer release the GIL) feed one GPU just as well.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from umarvel_ray.errors import UserError
from umarvel_ray.mine.embeddings import Embeddings, embedding_table, read_embeddings, vectors_of
from umarvel_ray.mine.pool import Pool
from umarvel_ray.mine.shards import close_output, digest_of_table, open_output, read_shard, shard_path, write_shard
from umarvel_ray.mine.topk import TopK, topk_of_rows
from umarvel_ray.model.checkpoint import check_files, load_settings
from umarvel_ray.progress import progress
from umarvel_ray.recipe import Cluster, Engine, ModelSettings

SHARD_ROWS = 512
CACHE_BYTES = 2**30  # per actor


@ray.remote
class EmbedderActor:
    """One device. `checkpoint` is what `describe` returns, and a `truncate_dim` where there is one."""

    def __init__(self, engine: Engine, gpu: bool, threads: int) -> None:
        from umarvel_ray.mine.cached_embedder import CachedEmbedder  # the driver does without the model

        torch.set_num_threads(threads)
        self._device = "cuda" if gpu else "cpu"
        cache = CACHE_BYTES if engine.cache_vision else 0
        self._embedder = CachedEmbedder(self._device, engine.dtype, engine.token_budget, threads, cache)

    def embed_shard(self, checkpoint: dict[str, Any], rows: pa.Table, side: str, folder: Path, index: int) -> int:
        """Embed and write one shard; returns the number of rows done."""
        self._embedder.load(**checkpoint)
        ids, vectors, quarantined = self._embedder.embed(rows.to_pylist(), side)
        write_shard(folder, index, embedding_table(ids, vectors), quarantined)
        return rows.num_rows

    def read_vectors(self, folder: Path, shards: list[int]) -> np.ndarray:
        return np.concatenate([vectors_of(read_shard(folder, index)) for index in shards])

    def pair_scores(self, vectors: np.ndarray, start: int, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.einsum("nd,nd->n", queries, vectors[rows - start])

    def topk(self, vectors: np.ndarray, start: int, queries: np.ndarray, k: int, rows, exclude) -> TopK:
        return topk_of_rows(queries, vectors, start, k, rows, exclude, device=self._device)


class EmbedderPool(Pool):
    """The embedding actors of a run; they also search, exactly, in what they embedded (see mine/exact.py)."""

    def __init__(self, cluster: Cluster, engine: Engine) -> None:
        super().__init__(EmbedderActor, cluster, engine, "embedding")


def embed_table(
    pool: EmbedderPool,
    rows: pa.Table,
    side: str,
    out_dir: str | Path,
    checkpoint: str | Path,
    what: str = "items",
    settings: ModelSettings | None = None,
    shard_rows: int = SHARD_ROWS,
    truncate_dim: int | None = None,
) -> Embeddings:
    """Embed every row of a documents or queries table, or finish an earlier attempt at exactly that.

    Writes shards, `quarantine.parquet` and `manifest.json` under `out_dir` (mine/shards.py). Shards that exist are kept
    when rows, side, checkpoint, settings and dimension are the same, else the folder starts anew. If all exist no actor
    starts.

    Args:
        side: "query" or "document".
        checkpoint: an HF directory; `settings` overrides its own, and is needed for a base without any.
        what: names the rows on the progress bar.
        truncate_dim: see `Embedder.from_pretrained`; the manifest's `dimension` says how long the vectors are.

    Returns:
        ids and vectors in the order of `rows`, without quarantined rows.

    Raises:
        UserError: an empty table, unreadable checkpoint, no such dimension, disk full, an actor died too often.
    """
    if not rows.num_rows:
        raise UserError(f"{what}: no rows to embed; check the table")
    folder = Path(out_dir)
    described = describe(checkpoint, settings)
    cut = {"truncate_dim": truncate_dim} if truncate_dim else {}  # so that folders without it stay as they are
    plan = {
        "checkpoint": described["identity"],
        "side": side,
        "rows": rows.num_rows,
        "content": digest_of_table(rows),
        "shard_rows": shard_rows,
        **cut,
    }
    missing = open_output(folder, plan, -(-rows.num_rows // shard_rows))
    if missing:

        def submit(actor: Any, index: int) -> ray.ObjectRef:
            part = rows.slice(index * shard_rows, shard_rows)
            return actor.embed_shard.remote(described | cut, part, side, folder, index)

        left = sum(min(shard_rows, rows.num_rows - index * shard_rows) for index in missing)
        with progress(rows.num_rows, f"embed {what}", "row") as bar:
            bar.update(rows.num_rows - left)
            for done in pool.run(missing, submit):
                bar.update(done)
    dimension = pq.read_schema(shard_path(folder, 0)).field("embedding").type.list_size
    close_output(folder, rows.num_rows, {"dimension": dimension})
    return read_embeddings(folder)


def describe(checkpoint: str | Path, settings: ModelSettings | None = None) -> dict[str, Any]:
    """What an actor needs to load a checkpoint, and the digest of its weights and settings.

    Raises:
        UserError: files missing or truncated; a base without settings.
    """
    path = Path(checkpoint).absolute()
    check_files(path)
    settings = settings or load_settings(path)
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    for name in ("tokenizer.json", "preprocessor_config.json", "config.json"):
        digest.update((path / name).read_bytes() if (path / name).exists() else b"")
    return {"path": str(path), "settings": settings, "identity": digest.hexdigest()}
