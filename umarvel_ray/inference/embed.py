"""Bulk embedding: turn a table of items into shards of vectors, on a group of actors.

    with EmbedderGroup(recipe.cluster, recipe.compute) as embedders:
        embeddings = embed_table(embedders, dataset.documents, "document", run / "documents", ref, "documents")

Each actor does both the preprocessing and the inference: its threads read, decode and tokenize the next rows while its
device runs the model. Separate preprocessing processes would cost 400 MB each and copy 100 KB of pixels per picture
between processes; threads suffice to feed a GPU, because Pillow and the tokenizer release the GIL.
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
    """Embeds shards on one device, and runs functions next to the resulting vectors."""

    def __init__(self, compute: Compute, device: str, threads: int) -> None:
        from umarvel_ray.inference.cached_embedder import CachedEmbedder  # keeps the model code out of the driver

        torch.set_num_threads(threads)
        cache = CACHE_BYTES if compute.cache_vision else 0
        self._embedder = CachedEmbedder(device, compute.dtype, compute.token_budget, threads, cache)

    def embed_shard(
        self, ref: CheckpointRef, truncate_dim: int | None, rows: pa.Table, side: str, folder: Path, index: int
    ) -> int:
        """Embed and write one shard; returns the number of input rows."""
        self._embedder.load(ref, truncate_dim)
        ids, vectors, quarantined = self._embedder.embed(rows.to_pylist(), side)
        write_shard(folder, index, embedding_table(ids, vectors), quarantined)
        return rows.num_rows

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in this actor; its result stays in this node's object store until it is fetched."""
        return function(*args)


class EmbedderGroup(ActorGroup):
    """The embedding actors of a run. They also run exact search over the vectors (`retrieve/exact.py`)."""

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
    """Embed every row of a documents or queries table, resuming an interrupted attempt with the same inputs.

    Writes shards, `quarantine.parquet` and `manifest.json` under `out_dir` (`inference/shards.py`). Existing shards are
    kept if the rows, side, checkpoint, settings and dimension are unchanged; otherwise the folder is emptied first. No
    actor starts if all shards exist.

    Args:
        side: "query" or "document".
        what: names the rows in errors and on the progress bar.
        truncate_dim: see `Embedder.from_pretrained`; the manifest records the length of the vectors as `dimension`.

    Returns:
        ids and vectors in the order of `rows`, without quarantined rows.

    Raises:
        UserError: an empty table, an invalid `truncate_dim`, a full disk, or an actor that died too often.
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
