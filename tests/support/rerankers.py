"""A tiny random reranker, and its scores of one pair at a time."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from umarvel_ray.data.tables import Dataset, item_of
from umarvel_ray.model.checkpoint import CheckpointRef, save_checkpoint
from umarvel_ray.model.reranker import Reranker, RerankerModel
from umarvel_ray.recipe import Recipe, load_recipe


def make_reranking_recipe() -> Recipe:
    changes = ["evaluate.k=3", "evaluate.k_of={}", "evaluate.rerank_top=6", "cluster.embedders=1"]
    return load_recipe("demo", changes)


def make_reranker(base: Path, recipe: Recipe, folder: Path) -> CheckpointRef:
    settings = recipe.model.for_reranker(64)
    save_checkpoint(RerankerModel.from_pretrained(base, settings), folder, settings, {"phase": "reranker"})
    return CheckpointRef.of(folder)


def score_singly(ref: CheckpointRef, dataset: Dataset, table: pa.Table) -> list[list[float]]:
    """P(yes) of each candidate of each query, by the library's reranker."""
    reranker = Reranker.from_pretrained(ref.path)
    rows = dataset.documents.to_pylist() + dataset.queries("test").to_pylist()
    item = {row["id"]: item_of(row) for row in rows}
    return [
        [float(reranker.score(item[row["query_id"]], [item[id_]])[0]) for id_ in row["document_ids"]]
        for row in table.to_pylist()
    ]
