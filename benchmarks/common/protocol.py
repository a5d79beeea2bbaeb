"""The demo's evaluation protocol for any vectors: Recall@k by task, in local and global pools, by exact search."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from umarvel_ray.data.content import own_pictures, picture_key
from umarvel_ray.data.tables import Dataset
from umarvel_ray.evaluate.results import SCOPES
from umarvel_ray.recipe import Evaluate
from umarvel_ray.retrieve.metrics import chance_at_k, hit_at_k, mean
from umarvel_ray.retrieve.topk import topk


class Protocol:
    """One split's queries and pools. Documents that show a query's own picture and do not answer it are not returned.

    Attributes:
        documents: rows of the split's global pool; document vectors come in this order.
        queries: the split's query rows by task.
    """

    def __init__(self, data: Dataset, settings: Evaluate, split: str) -> None:
        self.settings = settings
        self.ids = data.global_pool(split)
        self.documents = data.documents.take([data.row_of[id_] for id_ in self.ids]).to_pylist()
        self.queries: dict[str, list[dict]] = defaultdict(list)
        for query in data.queries(split).to_pylist():
            self.queries[query["task"]].append(query)
        row_of = {id_: row for row, id_ in enumerate(self.ids)}
        self._pools = {
            task: {
                "local": np.sort([row_of[id_] for id_ in data.pool(task, split)]),
                "global": np.arange(len(self.ids)),
            }
            for task in self.queries
        }
        self._row_of = row_of
        self._shown_by: dict[str, list[str]] = defaultdict(list)  # picture → documents that show it
        for row in self.documents:
            if row["image"] is not None:
                self._shown_by[picture_key(row["image"])].append(row["id"])

    def k(self, task: str) -> int:
        return self.settings.k_of.get(task, self.settings.k)

    def recall(
        self, task: str, queries: Sequence[dict], query_vectors: np.ndarray, documents: np.ndarray, scope: str = "local"
    ) -> float:
        """Mean Recall@k.

        Args:
            queries: rows of the task's queries.
            query_vectors: their vectors (n, d).
            documents: vectors (m, d) of `self.documents`.
        """
        pool, k = self._pools[task][scope], self.k(task)
        exclude = [self._excluded(query, pool) for query in queries]
        _, found = topk(query_vectors, documents[pool], k, exclude)
        return mean(
            [
                hit_at_k([self.ids[pool[place]] for place in places if place >= 0], set(query["positive_ids"]), k)
                for places, query in zip(found, queries, strict=True)
            ]
        )

    def recalls(self, query_vectors: dict[str, np.ndarray], documents: np.ndarray) -> dict[str, dict[str, float]]:
        """Recall by scope and task, with the average over tasks.

        Args:
            query_vectors: by task, in the order of `self.queries`.
        """
        return {
            scope: _with_average(
                {
                    task: self.recall(task, rows, query_vectors[task], documents, scope)
                    for task, rows in self.queries.items()
                }
            )
            for scope in SCOPES
        }

    def chances(self) -> dict[str, dict[str, float]]:
        """What a random ranking would score, by scope and task, with the average over tasks."""
        return {scope: _with_average({task: self._chance(task, scope) for task in self.queries}) for scope in SCOPES}

    def _chance(self, task: str, scope: str) -> float:
        pool = self._pools[task][scope]
        inside = {self.ids[row] for row in pool}
        return mean(
            [
                chance_at_k(
                    len(pool) - len(self._excluded(query, pool)), len(inside & set(query["positive_ids"])), self.k(task)
                )
                for query in self.queries[task]
            ]
        )

    def _excluded(self, query: dict, pool: np.ndarray) -> np.ndarray:
        """Places in the ascending pool that the query must not find."""
        own = own_pictures(query, set(query["positive_ids"]), self._shown_by)
        rows = np.array([self._row_of[id_] for id_ in own], np.int64)
        return np.searchsorted(pool, rows[np.isin(rows, pool)])


def _with_average(values: dict[str, float]) -> dict[str, float]:
    return values | {"average": mean(list(values.values()))}
