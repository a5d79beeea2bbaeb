"""What was measured of one model on one published benchmark, on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from umarvel_ray.data.writing import AVERAGE
from umarvel_ray.files import write_json
from umarvel_ray.retrieve.metrics import mean

RESULT = "measured.json"
Scores = dict[str, dict[str, dict[str, float]]]  # scope → task → metric → value, from 0 to 1; "queries" is their number


@dataclass(frozen=True)
class Measured:
    """One row of a table.

    Attributes:
        model: what the row is called.
        identity: digest of the model and of what it was measured on.
        notes: further facts for the report, for example {"protocol": "reference"}.
    """

    benchmark: str
    model: str
    scores: Scores
    identity: str
    notes: dict[str, Any] = field(default_factory=dict)

    def value(self, scope: str, task: str, metric: str) -> float | None:
        """A number, or for the task "average" the unweighted mean over all tasks; None if it was not measured."""
        tasks = self.scores.get(scope, {})
        if task != AVERAGE:
            return tasks.get(task, {}).get(metric)
        values = [numbers[metric] for numbers in tasks.values() if metric in numbers]
        return mean(values) if values else None

    def save(self, folder: Path) -> None:
        write_json(folder / RESULT, asdict(self))


def read_measured(root: Path) -> list[Measured]:
    """Everything that was measured below a folder, in the order of the paths."""
    return [Measured(**json.loads(path.read_text())) for path in sorted(root.rglob(RESULT))]


def saved_in(folder: Path, identity: str) -> Measured | None:
    """What a folder holds, if it is of the same model and data."""
    path = folder / RESULT
    found = Measured(**json.loads(path.read_text())) if path.is_file() else None
    return found if found and found.identity == identity else None


def mean_of(parts: Sequence[Scores]) -> Scores:
    """The mean of each number over scores of the same tasks."""
    first: Mapping[str, Any] = parts[0]
    return {
        scope: {
            task: {metric: mean([part[scope][task][metric] for part in parts]) for metric in numbers}
            for task, numbers in tasks.items()
        }
        for scope, tasks in first.items()
    }
