"""The work of a worker group: one `PhaseSpec` per phase, made of paths and values only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from umarvel_ray.recipe import Compute, ModelSettings, TrainingPhase
from umarvel_ray.runs import Run

FAILURES = "failures.jsonl"
VISION_CACHE_BYTES = 2**30  # host memory of each worker


class PhaseSpec(NamedTuple):
    """One phase, from the checkpoint `parent` to the checkpoint `output`.

    Attributes:
        folder: holds the batch plan, the step log and the failure records.
        provenance: what the checkpoint's `umarvel.json` records besides the phase and its results.
    """

    name: str
    phase: TrainingPhase
    parent: str
    output: str
    folder: str
    settings: ModelSettings
    compute: Compute
    seed: int
    provenance: dict[str, Any]

    @property
    def plan_path(self) -> Path:
        return Path(self.folder) / "plan.parquet"

    @property
    def log_path(self) -> Path:
        return Path(self.folder) / "log.jsonl"

    @property
    def error_path(self) -> Path:
        """One line: the user error that ended the phase."""
        return Path(self.folder) / "error.txt"

    @property
    def failures_path(self) -> Path:
        return Path(self.folder) / FAILURES

    @property
    def done(self) -> bool:
        return Path(self.output).exists()


def phase_spec(
    run: Run, name: str, phase: TrainingPhase, parent: str, settings: ModelSettings | None = None
) -> PhaseSpec:
    """Phase `name` of a run, trained from the checkpoint of phase `parent`.

    Args:
        settings: override the recipe's `model`.
    """
    return PhaseSpec(
        name=name,
        phase=phase,
        parent=str(run.checkpoint(parent)),
        output=str(run.checkpoint(name)),
        folder=str(run.dir / "train" / name),
        settings=settings or run.recipe.model,
        compute=run.recipe.compute,
        seed=run.recipe.seed,
        provenance={"recipe": run.recipe.model_dump(mode="json"), "data": run.recipe.data.root},
    )
