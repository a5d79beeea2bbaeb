"""A row of the ladder with random rankings of a chosen quality, as an evaluation would leave it on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from umarvel_ray.data.tables import Dataset
from umarvel_ray.evaluate.results import SCOPES, LadderResult, save_rankings
from umarvel_ray.recipe import Recipe
from umarvel_ray.retrieve.metrics import positives_of, score_ranking
from umarvel_ray.retrieve.rank import RANKING


def random_result(dataset: Dataset, recipe: Recipe, name: str, quality: float, folder: Path) -> LadderResult:
    """A result whose queries find a positive among the first five with probability `quality`, otherwise by chance."""
    rng, rankings = np.random.default_rng(len(name)), {}
    queries = dataset.queries("test").select(["id", "task", "positive_ids"]).to_pylist()
    for scope in SCOPES:
        pools = {task: dataset.pool(task, "test") for task in dataset.tasks("test")}
        global_pool, rows = dataset.global_pool("test"), []
        for query in queries:
            pool = global_pool if scope == "global" else pools[query["task"]]
            ids = [pool[i] for i in rng.choice(len(pool), 10, replace=False)]
            if rng.random() < quality * (1.0 if scope == "local" else 0.8):
                ids = [id_ for id_ in ids if id_ != query["positive_ids"][0]][:9]
                ids.insert(int(rng.integers(0, 5)), query["positive_ids"][0])
            scores = np.sort(rng.uniform(0.2, 0.9, len(ids)))[::-1].astype(np.float32)
            rows.append({"query_id": query["id"], "task": query["task"], "document_ids": ids, "scores": scores.tolist(),
                         "pool_size": len(pool)})  # fmt: skip
        rankings[scope] = pa.Table.from_pylist(rows, RANKING)
    save_rankings(folder, rankings)
    positives = positives_of(dataset, "test")
    scores = {scope: score_ranking(ranking, positives, recipe.evaluate, {}) for scope, ranking in rankings.items()}
    return LadderResult(name, scores, folder, seconds=12.0, notes={"pooling": "mean"})
