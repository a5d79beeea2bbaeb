"""What one checkpoint of the ladder scored: numbers per task and scope, and the rankings they come from, on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from umarvel_ray.files import atomic_path, write_json
from umarvel_ray.retrieve.metrics import mean

SCOPES = ("local", "global")
AVERAGE = "average"
RERANKED = "recall+rerank"  # the ladder's last row


@dataclass
class LadderResult:
    """One row of the ladder.

    Attributes:
        name: the phase that made the checkpoint, "base", or `RERANKED`.
        scores: scope → task → {"recall", "ndcg@10", "mrr@10", "chance", "k", "queries"}; recall and chance are at k.
        folder: holds `ranking-local.parquet` and `ranking-global.parquet` (columns of retrieve.rank.RANKING).
        notes: what else a reader should know, as {"pooling": "mean"} or {"weight local": 0.5}.
        identity: digest of what was evaluated; equal identity, equal result.
    """

    name: str
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
        write_json(self.folder / "result.json", asdict(self) | {"folder": None})

    def _with_average(self, scope: str, name: str) -> dict[str, float]:
        values = {task: numbers[name] for task, numbers in self.scores[scope].items()}
        return values | {AVERAGE: mean(list(values.values()))}


def load_result(folder: Path, identity: str) -> LadderResult | None:
    """The result saved in a folder, if it is of this very evaluation."""
    path = folder / "result.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    return LadderResult(**saved | {"folder": folder}) if saved.get("identity") == identity else None


def save_rankings(folder: Path, rankings: Mapping[str, pa.Table]) -> None:
    for scope, ranking in rankings.items():
        with atomic_path(folder / f"ranking-{scope}.parquet") as partial:
            pq.write_table(ranking, partial)
