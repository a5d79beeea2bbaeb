"""The result of one checkpoint of the ladder: metrics per task and scope, and the rankings behind them, on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from umarvel_ray.data.writing import AVERAGE
from umarvel_ray.files import write_json
from umarvel_ray.retrieve.metrics import mean
from umarvel_ray.retrieve.rank import Scope, read_ranking

SCOPES: tuple[Scope, ...] = ("local", "global")
RERANKED = "recall+rerank"  # the ladder's last row


@dataclass
class LadderResult:
    """One row of the ladder.

    Attributes:
        name: the phase that made the checkpoint, "base", or `RERANKED`.
        scores: scope → task → {"recall", "ndcg@10", "mrr@10", "chance", "k", "queries"}; recall and chance are at k.
        folder: holds the rankings, in the folders `ranking-local` and `ranking-global`.
        identity: digest of what was evaluated; equal identities mean equal results.
        seconds: wall time of the evaluation.
        notes: further facts for the report, for example {"pooling": "mean"} or {"weight local": 0.5}.
    """

    name: str
    scores: dict[str, dict[str, dict[str, float]]]
    folder: Path
    identity: str = ""
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def local(self) -> dict[str, float]:
        """Recall in local pools by task, and "average" over the tasks."""
        return self._with_average("local", "recall")

    @property
    def global_(self) -> dict[str, float]:
        """Recall in the global pool by task, and "average" over the tasks."""
        return self._with_average("global", "recall")

    def chance(self, scope: str) -> dict[str, float]:
        """The expected recall of a random ranking by task, and "average" over the tasks."""
        return self._with_average(scope, "chance")

    def ranking(self, scope: str) -> pa.Table:
        """The saved ranking of a scope (columns of retrieve.rank.RANKING)."""
        return read_ranking(ranking_folder(self.folder, scope))

    def save(self) -> None:
        write_json(self.folder / "result.json", asdict(self) | {"folder": None})

    def _with_average(self, scope: str, name: str) -> dict[str, float]:
        values = {task: numbers[name] for task, numbers in self.scores[scope].items()}
        return values | {AVERAGE: mean(list(values.values()))}


def open_result(folder: Path, identity: str) -> LadderResult | None:
    """The result saved in a folder; None if there is none.

    One of another evaluation is removed, because the rankings that it was computed from will be replaced.
    """
    path = folder / "result.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    if saved.get("identity") == identity:
        return LadderResult(**saved | {"folder": folder})
    path.unlink(missing_ok=True)
    return None


def ranking_folder(folder: Path, scope: str) -> Path:
    """Where the ranking of a scope is kept in the folder of a result."""
    return folder / f"ranking-{scope}"
