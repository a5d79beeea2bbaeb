"""The demo's evaluation protocol for any vectors: Recall@k by task, in local and global pools, by exact search."""

from __future__ import annotations

from typing import Any

import numpy as np

from umarvel_ray.data.content import NO_PICTURE
from umarvel_ray.data.dataset import ITEM_COLUMNS, Dataset, item_of
from umarvel_ray.evaluate.results import SCOPES
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import Evaluate
from umarvel_ray.retrieve.metrics import Hits, chance_at_k, count_distinct, mean, recall_at_k
from umarvel_ray.retrieve.topk import topk


class Protocol:
    """One split's queries and pools. Documents that show a query's own picture and do not answer it are not returned.

    Attributes:
        documents: row numbers of the split's global pool, ascending; document vectors come in this order.
        tasks: positions of the split's queries by task.
    """

    def __init__(self, data: Dataset, settings: Evaluate, split: str) -> None:
        self.settings = settings
        self.documents = data.global_pool(split)
        self._queries, self._table = data.queries(split), data.documents
        self.tasks = {task: self._queries.of_task(task) for task in data.tasks(split)}
        self._pools = {
            task: {"local": np.sort(data.pool(task, split)), "global": self.documents} for task in self.tasks
        }
        self._document_keys = data.documents.column("picture_key").to_numpy()
        self._query_keys = self._queries.table.column("picture_key").to_numpy()[self._queries.rows]

    def k(self, task: str) -> int:
        return self.settings.k_of.get(task, self.settings.k)

    def document_items(self) -> list[dict[str, Any]]:
        """The items of `self.documents`."""
        return [item_of(row) for row in self._table.rows(self.documents, ITEM_COLUMNS)]

    def query_items(self, task: str) -> list[dict[str, Any]]:
        """The items of a task's queries."""
        return [item_of(row) for row in self._queries.table.rows(self._queries.rows[self.tasks[task]], ITEM_COLUMNS)]

    def recall(
        self, task: str, queries: np.ndarray, query_vectors: np.ndarray, documents: np.ndarray, scope: str = "local"
    ) -> float:
        """Mean Recall@k.

        Args:
            queries: positions of queries of the task, int64 (n,).
            query_vectors: their vectors (n, d).
            documents: vectors (m, d) of `self.documents`.
        """
        pool, k = self._pools[task][scope], self.k(task)
        inside = np.searchsorted(self.documents, pool)
        _, found = topk(query_vectors, documents[inside], k, self._excluded(queries, pool))
        rows = np.where(found >= 0, pool[found], -1)
        owners, ranks = np.nonzero(
            self._queries.positives.take(queries).contains_pairs(np.arange(len(rows))[:, None], rows)
        )
        return float(recall_at_k(Hits(owners, ranks), np.full(len(queries), k)).mean())

    def recalls(self, query_vectors: dict[str, np.ndarray], documents: np.ndarray) -> dict[str, dict[str, float]]:
        """Recall by scope and task, with the average over tasks.

        Args:
            query_vectors: by task, in the order of `self.tasks`.
        """
        return {
            scope: _with_average(
                {
                    task: self.recall(task, queries, query_vectors[task], documents, scope)
                    for task, queries in self.tasks.items()
                }
            )
            for scope in SCOPES
        }

    def chances(self) -> dict[str, dict[str, float]]:
        """What a random ranking would score, by scope and task, with the average over tasks."""
        return {scope: _with_average({task: self._chance(task, scope) for task in self.tasks}) for scope in SCOPES}

    def _chance(self, task: str, scope: str) -> float:
        pool, queries = self._pools[task][scope], self.tasks[task]
        positives = self._queries.positives.take(queries)
        relevant = count_distinct(positives.keep(np.isin(positives.values, pool)))
        sizes = len(pool) - self._excluded(queries, pool).counts
        return float(chance_at_k(sizes, relevant, np.full(len(queries), self.k(task))).mean())

    def _excluded(self, queries: np.ndarray, pool: np.ndarray) -> Ragged:
        """Places in the ascending pool that each query must not find."""
        keys = self._query_keys[queries][:, None]
        owners, places = np.nonzero((keys == self._document_keys[pool]) & (keys != NO_PICTURE))
        shown = Ragged.of_counts(np.bincount(owners, minlength=len(queries)), places)
        return shown.keep(~self._queries.positives.take(queries).contains_pairs(shown.owners, pool[shown.values]))


def _with_average(values: dict[str, float]) -> dict[str, float]:
    return values | {"average": mean(list(values.values()))}
