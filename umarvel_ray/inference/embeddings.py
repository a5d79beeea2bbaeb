"""Embeddings as Arrow tables, and reading them back from shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from umarvel_ray.inference.shards import is_complete, read_manifest, read_shards


class Embeddings(NamedTuple):
    """Row i of `vectors`, float32 (n, d) of unit norm, embeds `ids[i]`."""

    ids: list[str]
    vectors: np.ndarray


def embedding_table(rows: Sequence[int], ids: list[str], vectors: np.ndarray) -> pa.Table:
    """A table with columns `row: int64`, `id: string` and `embedding: fixed_size_list<float32>[d]`.

    Args:
        rows: numbers of the embedded rows in their table.
        vectors: (n, d).
    """
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    embedding = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    columns = [pa.array(rows, pa.int64()), pa.array(ids, pa.string()), embedding]
    return pa.table(columns, names=["row", "id", "embedding"])


def vectors_of(table: pa.Table) -> np.ndarray:
    """The embedding column as float32 (n, d); n may be 0."""
    column = table["embedding"]
    flat = column.combine_chunks().flatten() if table.num_rows else pa.array([], pa.float32())
    return flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(-1, column.type.list_size)


def read_embeddings(folder: str | Path) -> Embeddings:
    """All embeddings of a finished embed job, in the order of its input rows, without quarantined rows.

    Raises:
        UserError: the folder holds no finished embed job.
    """
    table = read_shards(Path(folder))
    return Embeddings(table["id"].to_pylist(), vectors_of(table))


def embedder_of(folder: str | Path) -> str | None:
    """Identity (see `CheckpointRef`) of the checkpoint that a finished embed job used; None if no job has finished."""
    if not is_complete(Path(folder)):
        return None
    identity: str | None = read_manifest(Path(folder))["inputs"].get("checkpoint")
    return identity
