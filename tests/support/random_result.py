"""A row of the ladder with random rankings of a chosen quality, as an evaluation would leave it on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from umarvel_ray.data.dataset import Dataset
from umarvel_ray.evaluate.results import SCOPES, LadderResult, ranking_folder
from umarvel_ray.recipe import Recipe
from umarvel_ray.retrieve.metrics import score_ranking
from umarvel_ray.retrieve.rank import RANKING, write_ranking


def random_result(dataset: Dataset, recipe: Recipe, name: str, quality: float, folder: Path) -> LadderResult:
    """A result whose queries find a positive among the first five with probability `quality`, otherwise by chance."""
    rng, scores = np.random.default_rng(len(name)), {}
    queries = dataset.queries("test")
    for scope in SCOPES:
        pools = {task: dataset.pool(task, "test") for task in dataset.tasks("test")}
        global_pool, rows = dataset.global_pool("test"), []
        for number, row in enumerate(queries.rows.tolist()):
            task = queries.tasks[queries.task[number]]
            pool = global_pool if scope == "global" else pools[task]
            found = pool[rng.choice(len(pool), 10, replace=False)].tolist()
            if rng.random() < quality * (1.0 if scope == "local" else 0.8):
                positive = int(queries.positives.at(number)[0])
                found = [document for document in found if document != positive][:9]
                found.insert(int(rng.integers(0, 5)), positive)
            cosines = np.sort(rng.uniform(0.2, 0.9, len(found)))[::-1].astype(np.float32)
            rows.append({"query": row, "task": task, "documents": found, "scores": cosines.tolist(),
                         "pool_size": len(pool)})  # fmt: skip
        ranking = pa.Table.from_pylist(rows, RANKING)
        write_ranking(ranking_folder(folder, scope), ranking)
        scores[scope] = score_ranking(ranking, queries, recipe.evaluate)
    return LadderResult(name, scores, folder, seconds=12.0, notes={"pooling": "mean"})
