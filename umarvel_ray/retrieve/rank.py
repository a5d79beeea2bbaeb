"""Rankings: exact search of each query in its task's pool (local) or in the union of all pools (global).

Mining and evaluation share this code, so mining sees exactly what would be retrieved.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from umarvel_ray.data.content import own_pictures, picture_key
from umarvel_ray.data.tables import Dataset
from umarvel_ray.inference.embed import EmbedderGroup, embed_table
from umarvel_ray.inference.embeddings import Embeddings
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.retrieve.exact import ExactSearch

RANKING = pa.schema(
    [
        ("query_id", pa.string()),
        ("task", pa.string()),
        ("document_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("pool_size", pa.int64()),
    ]
)

Scope = Literal["local", "global"]


class Embedded(NamedTuple):
    """One split embedded by one checkpoint: the documents of its pools, searchable, and its queries."""

    documents: ExactSearch
    queries: Embeddings


def embed_split(
    embedders: EmbedderGroup,
    dataset: Dataset,
    split: str,
    ref: CheckpointRef,
    folder: Path,
) -> Embedded:
    """Embed the queries of a split and the union of its pools, resuming an interrupted attempt.

    Writes `folder/SPLIT-queries` and `folder/SPLIT-documents`.

    Raises:
        UserError: see `embed_table`; an empty pool.
    """
    rows = pa.array([dataset.row_of[id_] for id_ in dataset.global_pool(split)], pa.int64())
    documents_dir, queries_dir = folder / f"{split}-documents", folder / f"{split}-queries"
    embed_table(embedders, dataset.documents.take(rows), "document", documents_dir, ref, f"{split} documents")
    queries = embed_table(embedders, dataset.queries(split), "query", queries_dir, ref, f"{split} queries")
    return Embedded(ExactSearch(embedders, documents_dir), queries)


def rank(
    embedded: Embedded, dataset: Dataset, split: str, scope: Scope, depth: int, drop_query_image: bool = True
) -> pa.Table:
    """The `depth` nearest documents of every embedded query of the split.

    Args:
        drop_query_image: remove documents that show the query's own picture from its pool, unless they are its
            positives (docs/method.md#query-image-in-pool).

    Returns:
        Columns of RANKING, one row per query, tasks in the order of the pools. Documents come best first, `scores` are
        cosines, and `pool_size` is the number of documents that the query was ranked against.
    """
    search = embedded.documents
    columns = [name for name in ("id", "image", "positive_ids", "task") if name in dataset.queries(split).column_names]
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in dataset.queries(split).select(columns).to_pylist():
        by_task[row["task"]].append(row)
    vector_row = embedded.queries.row_of()
    with_picture = _documents_by_picture(dataset, search.ids) if drop_query_image else {}
    all_rows = np.arange(len(search.ids))
    tables = []
    for task in dataset.tasks(split):
        queries = [row for row in by_task[task] if row["id"] in vector_row]
        if not queries:
            continue
        rows = all_rows if scope == "global" else search.rows(dataset.pool(task, split))
        exclude = [search.rows(own_pictures(row, set(row["positive_ids"]), with_picture)) for row in queries]
        vectors = embedded.queries.vectors[[vector_row[row["id"]] for row in queries]]
        scores, found = search.topk(vectors, depth, None if scope == "global" else rows, exclude)
        valid = found >= 0
        tables.append(
            pa.table(
                [
                    [row["id"] for row in queries],
                    [task] * len(queries),
                    [[search.ids[i] for i in line[ok]] for line, ok in zip(found, valid, strict=True)],
                    [line[ok] for line, ok in zip(scores, valid, strict=True)],
                    [len(rows) - int(np.isin(excluded, rows).sum()) for excluded in exclude],
                ],
                schema=RANKING,
            )
        )
    return pa.concat_tables(tables) if tables else RANKING.empty_table()


def _documents_by_picture(dataset: Dataset, ids: list[str]) -> dict[str, list[str]]:
    images = dataset.documents["image"].take(pa.array([dataset.row_of[id_] for id_ in ids], pa.int64()))
    with_picture: dict[str, list[str]] = defaultdict(list)
    for id_, image in zip(ids, images.to_pylist(), strict=True):
        key = picture_key(image)
        if key is not None:
            with_picture[key].append(id_)
    return with_picture
