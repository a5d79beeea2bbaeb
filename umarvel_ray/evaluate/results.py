"""What one step of the ladder scored: numbers per task and scope, and the rankings they come from, kept on disk."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from umarvel_ray.data.tables import Dataset
from umarvel_ray.evaluate.metrics import chance_at_k, hit_at_k, mean, mrr_at_k, ndcg_at_k
from umarvel_ray.recipe import Evaluate

SCOPES = ("local", "global")
AVERAGE = "average"
RERANKED = "recall+rerank"  # the ladder's last row


@dataclass
class StepResult:
    """One row of the ladder.

    Attributes:
        scores: scope → task → {"recall", "ndcg@10", "mrr@10", "chance", "k", "queries"}; recall and chance are at k.
        folder: holds `ranking-local.parquet` and `ranking-global.parquet` (columns of mine.rank.RANKING).
        notes: what else a reader should know, as {"pooling": "mean"} or {"weight local": 0.5}.
        identity: digest of what was evaluated; equal identity, equal result.
    """

    step: str
    scores: dict[str, dict[str, dict[str, float]]]
    folder: Path
    identity: str = ""
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> dict[str, float]:
        """Recall by task, and "average"."""
        return self._with_average("local", "recall")

    @property
    def global_(self) -> dict[str, float]:
        return self._with_average("global", "recall")

    def chance(self, scope: str) -> dict[str, float]:
        """What a random ranking would score, by task, and "average"."""
        return self._with_average(scope, "chance")

    def ranking(self, scope: str) -> pa.Table:
        return pq.read_table(self.folder / f"ranking-{scope}.parquet")

    def save(self) -> None:
        partial = self.folder / ".result.json.partial"
        partial.write_text(json.dumps(asdict(self) | {"folder": None}, indent=1))
        os.replace(partial, self.folder / "result.json")

    def _with_average(self, scope: str, name: str) -> dict[str, float]:
        values = {task: numbers[name] for task, numbers in self.scores[scope].items()}
        return values | {AVERAGE: mean(list(values.values()))}


def load_result(folder: Path, identity: str) -> StepResult | None:
    """The result saved in a folder, if it is of this very evaluation."""
    path = folder / "result.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    return StepResult(**saved | {"folder": folder}) if saved.get("identity") == identity else None


def save_rankings(folder: Path, rankings: Mapping[str, pa.Table]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for scope, ranking in rankings.items():
        pq.write_table(ranking, folder / f"ranking-{scope}.parquet")


def positives_of(dataset: Dataset, split: str) -> dict[str, set[str]]:
    """Relevant document ids of each query."""
    table = dataset.queries(split).select(["id", "positive_ids"])
    return {row["id"]: set(row["positive_ids"]) for row in table.to_pylist()}


def not_ranked(queries: pa.Table, ranking: pa.Table) -> dict[str, list[str]]:
    """By task, the queries that have no ranking because they could not be embedded."""
    ranked = set(ranking["query_id"].to_pylist())
    lost = defaultdict(list)
    for id_, task in zip(queries["id"].to_pylist(), queries["task"].to_pylist(), strict=True):
        if id_ not in ranked:
            lost[task].append(id_)
    return lost


def score(
    ranking: pa.Table, positives: Mapping[str, Set[str]], settings: Evaluate, lost: Mapping[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Metrics by task.

    Args:
        ranking: columns of mine.rank.RANKING.
        lost: by task, queries that could not be embedded: they count, with recall 0.
    """
    numbers: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row in ranking.to_pylist():
        ids, relevant = row["document_ids"], positives[row["query_id"]]
        k = settings.k_of.get(row["task"], settings.k)
        numbers[row["task"]].append(
            {
                "recall": hit_at_k(ids, relevant, k),
                "ndcg@10": ndcg_at_k(ids, relevant),
                "mrr@10": mrr_at_k(ids, relevant),
                "chance": chance_at_k(row["pool_size"], min(len(relevant), row["pool_size"]), k),
            }
        )
    for task, ids in lost.items():
        numbers[task] += [dict.fromkeys(("recall", "ndcg@10", "mrr@10", "chance"), 0.0)] * len(ids)
    return {
        task: {name: mean([row[name] for row in rows]) for name in rows[0]}
        | {"k": settings.k_of.get(task, settings.k), "queries": len(rows)}
        for task, rows in numbers.items()
    }
