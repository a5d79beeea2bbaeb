"""Recall@k per task in local pools with an `Embedder` alone: what the benchmarks that change items or weights share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from umarvel_ray import Embedder
from umarvel_ray.data.content import own_pictures, picture_key
from umarvel_ray.data.tables import Dataset, item_of
from umarvel_ray.recipe import Evaluate
from umarvel_ray.retrieve.metrics import hit_at_k, mean
from umarvel_ray.retrieve.topk import topk


class LocalPools:
    """The split's documents, embedded once, and its pools."""

    def __init__(self, embedder: Embedder, data: Dataset, settings: Evaluate) -> None:
        self.data, self.settings = data, settings
        self.ids = data.global_pool(settings.split)
        rows = data.documents.take([data.row_of[id_] for id_ in self.ids]).to_pylist()
        self.documents = embedder.encode_document([item_of(row) for row in rows])
        self._place = {id_: number for number, id_ in enumerate(self.ids)}
        self._with_picture = defaultdict(list)
        for row in rows:
            if row["image"] is not None:
                self._with_picture[picture_key(row["image"])].append(row["id"])

    def queries(self) -> dict[str, list[dict]]:
        """Rows of the split's queries by task."""
        by_task = defaultdict(list)
        for query in self.data.queries(self.settings.split).to_pylist():
            by_task[query["task"]].append(query)
        return by_task

    def recall(self, task: str, queries: Sequence[dict], vectors: np.ndarray) -> float:
        """Mean Recall@k of the task's `queries`, embedded as `vectors` (n, d); their own pictures are not found."""
        pool = np.sort([self._place[id_] for id_ in self.data.pool(task, self.settings.split)])
        inside = set(pool)
        own = [own_pictures(query, set(query["positive_ids"]), self._with_picture) for query in queries]
        exclude = [np.searchsorted(pool, [n for n in map(self._place.get, ids) if n in inside]) for ids in own]
        k = self.settings.k_of.get(task, self.settings.k)
        _, found = topk(vectors, self.documents[pool], k, exclude)
        return mean(
            [
                hit_at_k([self.ids[pool[n]] for n in line if n >= 0], set(query["positive_ids"]), k)
                for line, query in zip(found, queries, strict=True)
            ]
        )
