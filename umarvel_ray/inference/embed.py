"""Bulk embedding: a table of items to shards of vectors, on a group of actors.

    with EmbedderGroup(recipe.cluster, recipe.compute) as embedders:
        embeddings = embed_table(embedders, dataset.documents, "document", run / "documents", ref, "documents")

An actor does both halves of the work: its threads read, decode and tokenize the next rows while its device runs the
model. Separate preprocessing processes would add 400 MB each and move 100 KB of pixels per picture between processes;
on a GPU node `cpus_per_embedder` threads (Pillow and the tokenizer release the GIL) feed one GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from umarvel_ray.data.content import digest_of_table
from umarvel_ray.errors import UserError
from umarvel_ray.inference.actors import ActorGroup
from umarvel_ray.inference.embeddings import Embeddings, embedding_table, read_embeddings
from umarvel_ray.inference.shards import close_output, open_output, shard_path, write_shard
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.progress import progress
from umarvel_ray.recipe import Cluster, Compute

SHARD_ROWS = 512
CACHE_BYTES = 2**30  # per actor


@ray.remote
class EmbedderActor:
    """One device: embeds shards, and runs functions on what was embedded."""

    def __init__(self, compute: Compute, device: str, threads: int) -> None:
        from umarvel_ray.inference.cached_embedder import CachedEmbedder  # the driver does without the model

        torch.set_num_threads(threads)
        cache = CACHE_BYTES if compute.cache_vision else 0
        self._embedder = CachedEmbedder(device, compute.dtype, compute.token_budget, threads, cache)

    def embed_shard(
        self, ref: CheckpointRef, truncate_dim: int | None, rows: pa.Table, side: str, folder: Path, index: int
    ) -> int:
        """Embed and write one shard; returns the number of rows done."""
        self._embedder.load(ref, truncate_dim)
        ids, vectors, quarantined = self._embedder.embed(rows.to_pylist(), side)
        write_shard(folder, index, embedding_table(ids, vectors), quarantined)
        return rows.num_rows

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function here; what it returns stays in this node's object store until it is fetched."""
        return function(*args)


class EmbedderGroup(ActorGroup):
    """The embedding actors of a run. They also search what they embedded, exactly (`retrieve/exact.py`)."""

    def __init__(self, cluster: Cluster, compute: Compute) -> None:
        super().__init__(EmbedderActor, cluster, compute, "embedding")


def embed_table(
    embedders: EmbedderGroup,
    rows: pa.Table,
    side: str,
    out_dir: str | Path,
    ref: CheckpointRef,
    what: str = "items",
    shard_rows: int = SHARD_ROWS,
    truncate_dim: int | None = None,
) -> Embeddings:
    """Embed every row of a documents or queries table, or finish an earlier attempt at exactly that.

    Writes shards, `quarantine.parquet` and `manifest.json` under `out_dir` (`inference/shards.py`). Existing shards are
    kept when rows, side, checkpoint, settings and dimension are the same, else the folder is emptied first. If all
    exist no actor starts.

    Args:
        side: "query" or "document".
        what: names the rows on the progress bar.
        truncate_dim: see `Embedder.from_pretrained`; the manifest's `dimension` says how long the vectors are.

    Returns:
        ids and vectors in the order of `rows`, without quarantined rows.

    Raises:
        UserError: an empty table, no such dimension, disk full, an actor died too often.
    """
    if not rows.num_rows:
        raise UserError(f"{what}: no rows to embed; check the table")
    folder = Path(out_dir)
    inputs = {
        "checkpoint": ref.identity,
        "side": side,
        "rows": rows.num_rows,
        "content": digest_of_table(rows),
        "shard_rows": shard_rows,
        "truncate_dim": truncate_dim,
    }
    missing = open_output(folder, inputs, -(-rows.num_rows // shard_rows))
    if missing:

        def submit(actor: Any, index: int) -> ray.ObjectRef:
            part = rows.slice(index * shard_rows, shard_rows)
            return actor.embed_shard.remote(ref, truncate_dim, part, side, folder, index)

        left = sum(min(shard_rows, rows.num_rows - index * shard_rows) for index in missing)
        with progress(rows.num_rows, f"embed {what}", "row") as bar:
            bar.update(rows.num_rows - left)
            for done in embedders.run(missing, submit):
                bar.update(done)
    dimension = pq.read_schema(shard_path(folder, 0)).field("embedding").type.list_size
    close_output(folder, rows.num_rows, {"dimension": dimension})
    return read_embeddings(folder)
