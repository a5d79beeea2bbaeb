"""Bulk embedding: turn rows of a table into shards of vectors, on a group of actors.

    with EmbedderGroup(recipe.cluster, recipe.compute) as embedders:
        embed_table(embedders, Selection(dataset.documents, rows), "document", run / "documents", ref, "documents")

Each actor does both the preprocessing and the inference: its threads read, decode and tokenize the next rows while its
device runs the model. Separate preprocessing processes would cost 400 MB each and copy 100 KB of pixels per picture
between processes; threads suffice to feed a GPU, because Pillow and the tokenizer release the GIL.

An actor reads its rows from the table's file and writes its vectors to a file: neither passes through the driver.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from umarvel_ray.data.dataset import Selection
from umarvel_ray.errors import UserError
from umarvel_ray.inference.actors import ActorGroup
from umarvel_ray.inference.embeddings import embedding_table
from umarvel_ray.inference.gpus import Gpus
from umarvel_ray.inference.held import release_slice
from umarvel_ray.inference.shards import close_output, is_complete, open_output, shard_path, write_shard
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.cpu import prepare_cpu
from umarvel_ray.progress import progress
from umarvel_ray.recipe import Cluster, Compute

SHARD_ROWS = 512  # of a small table
MAX_SHARDS = 2048
READ_ROWS, READ_BATCHES = 512, 8  # rows, and batches of the table, whose size is bounded, in an actor at once
CACHE_BYTES = 2**30  # per actor


@ray.remote
class EmbedderActor:
    """Embeds shards on one device, and runs functions next to the resulting vectors."""

    def __init__(self, compute: Compute, device: str, threads: int) -> None:
        from umarvel_ray.inference.cached_embedder import CachedEmbedder  # keeps the model code out of the driver

        prepare_cpu(threads)
        cache = CACHE_BYTES if compute.cache_vision else 0
        self._embedder = CachedEmbedder(device, compute.dtype, compute.token_budget, threads, cache)

    def embed_shard(
        self, ref: CheckpointRef, truncate_dim: int | None, rows: Selection, side: str, folder: Path, index: int
    ) -> int:
        """Embed and write one shard; returns the number of input rows."""
        release_slice()
        self._embedder.load(ref, truncate_dim)
        parts, quarantined = [], []
        for part in rows.parts(min(READ_ROWS, READ_BATCHES * rows.table.batch_rows)):
            items = part.items()
            number_of = {item["id"]: number for item, number in zip(items, part.rows.tolist(), strict=True)}
            ids, vectors, unusable = self._embedder.embed(items, side)
            parts.append(embedding_table([number_of[id_] for id_ in ids], ids, vectors))
            quarantined += unusable
        write_shard(folder, index, pa.concat_tables(parts), quarantined)
        return rows.n

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in this actor; its result stays in this node's object store until it is fetched."""
        return function(*args)


class EmbedderGroup(ActorGroup):
    """The embedding actors of a run. They also run exact search over the vectors (`retrieve/exact.py`)."""

    def __init__(self, cluster: Cluster, compute: Compute, gpus: Gpus | None = None) -> None:
        super().__init__(EmbedderActor, cluster, compute, "embedding", gpus)


def rows_per_shard(rows: int) -> int:
    """SHARD_ROWS, or more if that would make over MAX_SHARDS shards."""
    return max(SHARD_ROWS, -(-rows // MAX_SHARDS))


def embed_table(
    embedders: EmbedderGroup,
    rows: Selection,
    side: str,
    out_dir: str | Path,
    ref: CheckpointRef,
    what: str = "items",
    shard_rows: int | None = None,
    truncate_dim: int | None = None,
) -> None:
    """Embed rows of a document or query table, resuming an interrupted attempt with the same inputs.

    Writes shards, `quarantine.parquet` and `manifest.json` under `out_dir` (`inference/shards.py`); a shard has the
    columns row, id and embedding, in the order of `rows`, without quarantined rows. Existing shards are kept if the
    rows, side, checkpoint, settings and dimension are unchanged; otherwise the folder is emptied first. No actor starts
    if all shards exist.

    Args:
        side: "query" or "document".
        what: names the rows in errors and on the progress bar.
        shard_rows: rows per shard; None for `rows_per_shard`.
        truncate_dim: see `Embedder.from_pretrained`; the manifest records the length of the vectors as `dimension`.

    Raises:
        UserError: no rows, an invalid `truncate_dim`, a full disk, or an actor that died too often.
    """
    if not rows.n:
        raise UserError(f"{what}: no rows to embed; check the table")
    folder = Path(out_dir)
    size = shard_rows or rows_per_shard(rows.n)
    inputs = {
        "checkpoint": ref.identity,
        "side": side,
        "content": rows.digest,
        "shard_rows": size,
        "truncate_dim": truncate_dim,
    }
    missing = open_output(folder, inputs, -(-rows.n // size))
    if not missing and is_complete(folder):
        return

    def submit(actor: Any, index: int) -> ray.ObjectRef:
        part = rows.part(index * size, (index + 1) * size)
        return actor.embed_shard.remote(ref, truncate_dim, part, side, folder, index)

    if missing:
        left = sum(min(size, rows.n - index * size) for index in missing)
        with progress(rows.n, f"embed {what}", "row") as bar:
            bar.update(rows.n - left)
            for done in embedders.run(missing, submit):
                bar.update(done)
    dimension = pq.read_schema(shard_path(folder, 0)).field("embedding").type.list_size
    close_output(folder, rows.n, {"dimension": dimension})
