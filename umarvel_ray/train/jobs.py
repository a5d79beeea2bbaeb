"""What a worker group is told to do: one `TrainJob` per optimisation run, described by files and values only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from umarvel_ray.recipe import Engine, ModelSettings, Step, Temperature
from umarvel_ray.runs import Run

VISION_CACHE_BYTES = 2**30  # of each worker's host memory

Kind = Literal["contrastive", "distil", "rerank"]


class TrainJob(NamedTuple):
    """One optimisation run from `parent` to `output`.

    `folder` holds the plan and the step log; `provenance` is what the checkpoint says about itself beside what is
    measured.
    """

    name: str
    kind: Kind
    step: Step
    temperature: Temperature | None
    two_way: bool
    parent: str
    output: str
    folder: str
    settings: ModelSettings
    engine: Engine
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
        return Path(self.folder) / "error.txt"

    @property
    def failures_path(self) -> Path:
        return Path(self.folder) / "failures.jsonl"

    @property
    def done(self) -> bool:
        return Path(self.output).exists()


def train_job(
    run: Run,
    name: str,
    kind: Kind,
    step: Step,
    parent: str,
    temperature: Temperature | None = None,
    two_way: bool = False,
) -> TrainJob:
    """The job that trains ladder step `name` from ladder step `parent` in a run's folder."""
    return TrainJob(
        name=name,
        kind=kind,
        step=step,
        temperature=temperature,
        two_way=two_way,
        parent=str(run.checkpoint(parent)),
        output=str(run.checkpoint(name)),
        folder=str(run.dir / "train" / name),
        settings=run.recipe.model,
        engine=run.recipe.engine,
        seed=run.recipe.seed,
        provenance={"recipe": run.recipe.model_dump(mode="json"), "data": run.recipe.data.root},
    )
