"""Rankings: each query against the documents of its task's pool (local) or of all pools (global), exactly.

Mining and evaluation share this: what is mined is what would be retrieved.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Literal, NamedTuple

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
    """One split under one checkpoint: its pools' documents, searchable, and its queries."""

    documents: ExactSearch
    queries: Embeddings


def embed_split(
    embedders: EmbedderGroup,
    dataset: Dataset,
    split: str,
    ref: CheckpointRef,
    folder: Path,
) -> Embedded:
    """Embed the queries of a split and the union of its pools into `folder/SPLIT-queries` and `…-documents`."""
    rows = pa.array([dataset.row_of[id_] for id_ in dataset.global_pool(split)], pa.int64())
    documents, queries = folder / f"{split}-documents", folder / f"{split}-queries"
    embed_table(embedders, dataset.documents.take(rows), "document", documents, ref, f"{split} documents")
    embedded = embed_table(embedders, dataset.queries(split), "query", queries, ref, f"{split} queries")
    return Embedded(ExactSearch(embedders, documents), embedded)


def rank(
    embedded: Embedded, dataset: Dataset, split: str, scope: Scope, depth: int, drop_query_image: bool = True
) -> pa.Table:
    """The `depth` nearest documents of every query of the split that was embedded.

    Args:
        drop_query_image: take documents that show the query's own picture, unless they are its positives, out of its
            pool.

    Returns:
        Columns of RANKING, one row per query, tasks in the order of the pools; best first, `scores` cosines,
        `pool_size` the number of documents the query was ranked against.
    """
    search = embedded.documents
    columns = [name for name in ("id", "image", "positive_ids", "task") if name in dataset.queries(split).column_names]
    by_task: dict[str, list[dict]] = defaultdict(list)
    for row in dataset.queries(split).select(columns).to_pylist():
        by_task[row["task"]].append(row)
    place_of = embedded.queries.row_of()
    shown = _documents_by_picture(dataset, search.ids) if drop_query_image else {}
    everywhere = np.arange(len(search.ids))
    tables = []
    for task in dataset.tasks(split):
        queries = [row for row in by_task[task] if row["id"] in place_of]
        if not queries:
            continue
        rows = everywhere if scope == "global" else search.rows(dataset.pool(task, split))
        exclude = [search.rows(own_pictures(row, set(row["positive_ids"]), shown)) for row in queries]
        vectors = embedded.queries.vectors[[place_of[row["id"]] for row in queries]]
        scores, found = search.topk(vectors, depth, None if scope == "global" else rows, exclude)
        real = found >= 0
        tables.append(
            pa.table(
                [
                    [row["id"] for row in queries],
                    [task] * len(queries),
                    [[search.ids[i] for i in line[ok]] for line, ok in zip(found, real, strict=True)],
                    [line[ok] for line, ok in zip(scores, real, strict=True)],
                    [len(rows) - int(np.isin(forbidden, rows).sum()) for forbidden in exclude],
                ],
                schema=RANKING,
            )
        )
    return pa.concat_tables(tables) if tables else RANKING.empty_table()


def _documents_by_picture(dataset: Dataset, ids: list[str]) -> dict[str, list[str]]:
    images = dataset.documents["image"].take(pa.array([dataset.row_of[id_] for id_ in ids], pa.int64()))
    shown: dict[str, list[str]] = defaultdict(list)
    for id_, image in zip(ids, images.to_pylist(), strict=True):
        if image is not None:
            shown[picture_key(image)].append(id_)
    return shown
