"""A tiny random reranker, and its scores of one pair at a time."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from tests.support.small_dataset import document_rows
from umarvel_ray.data.dataset import Dataset, item_of
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


def score_singly(ref: CheckpointRef, dataset: Dataset, table: pa.Table, split: str = "test") -> list[list[float]]:
    """P(yes) of each candidate of each query, by the library's reranker."""
    reranker = Reranker.from_pretrained(ref.path)
    documents, queries = document_rows(dataset), dataset.queries(split).table
    return [
        [float(reranker.score(item_of(query), [item_of(documents[number])])[0]) for number in row["documents"]]
        for row in table.to_pylist()
        for query in queries.rows([row["query"]])
    ]
