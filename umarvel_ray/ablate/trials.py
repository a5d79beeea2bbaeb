"""Run a table: every row is a run folder of its own that differs from the shared run in the ablated step only.

Rows of a table are trained in one worker group and embedded by one pool. What is finished is not repeated: a killed
table goes on in the middle of the row where it stopped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umarvel_ray import pipeline
from umarvel_ray.ablate.tables import Row, Table
from umarvel_ray.data.tables import Dataset, open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.metrics import hit_at_k
from umarvel_ray.evaluate.results import SCOPES, StepResult, positives_of
from umarvel_ray.evaluate.retrieve import evaluate_checkpoint
from umarvel_ray.model.checkpoint import read_provenance
from umarvel_ray.pipeline import Pools, Work
from umarvel_ray.recipe import Evaluate, Recipe
from umarvel_ray.runs import STAGE1, Run
from umarvel_ray.train.jobs import TrainJob
from umarvel_ray.train.launch import run_jobs

DIVERGED = ": loss is "  # how train/loop.py begins to say it
COMMON = ("embeddings", "scores", "quarantine")  # what rows with the same seed need not compute twice

# (row, seed, folder) → the row's recipe
Variant = Callable[[Row, int, Path], Recipe]
Hits = dict[str, dict[str, np.ndarray]]  # scope → task → (n,) 1 where a query found a positive


@dataclass(frozen=True)
class Trial:
    """A row with a seed, and the run folder it is tried in."""

    row: Row
    seed: int
    run: Run

    @property
    def name(self) -> str:
        return self.run.dir.name

    @property
    def failure(self) -> str | None:
        """The one line in which its training ended because the loss ran off; remove the folder to try again."""
        said = (file.read_text() for file in sorted(self.run.dir.glob("train/*/error.txt")))
        return next((line for line in said if DIVERGED in line), None)


@dataclass(frozen=True)
class Outcome:
    """What a trial scored: average recall by scope, and the hits it comes from; or why it has no score."""

    average: dict[str, float]
    hits: Hits
    failure: str | None = None


def build_shared(shared: Run, table: Table, pools: Pools) -> int | None:
    """Make the checkpoints that all rows start from with the ordinary stages, unless they are there.

    Returns:
        The seed that they say they were trained with; None where rows start from the base.

    Raises:
        UserError: the recipe leaves a step out that the table is about.
    """
    if any(not shared.has(step) for step in table.shared if step in STAGE1):
        pipeline.stage1(shared)
    if any(not shared.has(step) for step in table.shared):
        pipeline.stage2_and_reranker(shared, pools)
    for step in table.shared:
        shared.parent(step, f"table {table.number}")
    return read_provenance(shared.checkpoint(table.shared[0]))["recipe"]["seed"] if table.shared else None


def open_trials(shared: Run, table: Table, variant: Variant, seed: int, rows: Sequence[Row]) -> list[Trial]:
    """Run folders of the rows that train, with links to what they share.

    Raises:
        UserError: a folder was made with other values.
    """
    home = shared.dir / "ablations"
    trials = []
    for row in rows:
        if row.changes is None:
            continue
        folder = home / f"table-{table.number}" / f"{_slug(row.label)}-seed-{seed}"
        run = Run.open(variant(row, seed, folder))
        for step in table.shared:
            _link(run.checkpoint(step), shared.checkpoint(step))
        for name in COMMON:
            common = home / "common" / f"seed-{seed}" / name
            common.mkdir(parents=True, exist_ok=True)
            _link(run.dir / name, common)
        trials.append(Trial(row, seed, run))
    return trials


def train(shared: Run, table: Table, trials: Sequence[Trial], pools: Pools) -> None:
    """Train what is not finished. A row whose loss runs off is left behind with its error; the others go on.

    Raises:
        UserError: what stops all rows, such as a full disk.
    """
    prepare = vars(pipeline)[f"prepare_{table.stage}"]
    while todo := [t for t in trials if not t.run.has(table.step) and not t.failure]:
        work: list[Work] = []
        for trial in todo:
            prepared = prepare(trial.run, pools)
            work += [Work(_renamed(job, trial), queries) for job, queries in prepared.work if not job.done]
        queries = {job.name: table_ for job, table_ in work}
        group = f"table-{table.number}-seed-{todo[0].seed}"
        jobs, documents = [job for job, _ in work], prepared.data.documents
        try:
            run_jobs(group, jobs, queries, documents, shared.recipe.cluster, shared.dir / "ablations")
        except UserError:
            if not any(trial.failure for trial in todo):
                raise


def measure(trial: Trial, table: Table, data: Dataset, pools: Pools) -> Outcome:
    """Evaluate a trial, or read back its evaluation."""
    if trial.failure:
        return Outcome({}, {}, trial.failure)
    return measure_checkpoint(trial.run, table.step, data, pools)


def measure_checkpoint(run: Run, step: str, data: Dataset, pools: Pools) -> Outcome:
    """Evaluate the checkpoint of a ladder step in a run's folder, or read back its evaluation."""
    result = evaluate_checkpoint(
        pools.embedders, data, run.recipe, run.checkpoint(step), step, run.dir / "evaluation" / step
    )
    average = {"local": result.local["average"], "global": result.global_["average"]}
    return Outcome(average, hits_of(result, data, run.recipe.evaluate))


def hits_of(result: StepResult, data: Dataset, settings: Evaluate) -> Hits:
    """Which queries found a positive among their first k, in the order of the query table; lost queries did not."""
    positives = positives_of(data, settings.split)
    table = data.queries(settings.split).select(["id", "task"]).to_pylist()
    hits: Hits = {}
    for scope in SCOPES:
        ranked = {row["query_id"]: row["document_ids"] for row in result.ranking(scope).to_pylist()}
        by_task: dict[str, list[float]] = {}
        for row in table:
            k = settings.k_of.get(row["task"], settings.k)
            by_task.setdefault(row["task"], []).append(hit_at_k(ranked.get(row["id"], []), positives[row["id"]], k))
        hits[scope] = {task: np.array(values) for task, values in by_task.items()}
    return hits


def evaluation_data(run: Run) -> Dataset:
    """The data, its evaluation split checked."""
    data = open_dataset(run.recipe.data)
    data.validate(run.recipe.evaluate.split)
    return data


def _renamed(job: TrainJob, trial: Trial) -> TrainJob:
    """Ray Train and the progress bars tell the jobs of a group apart by name."""
    return job._replace(name=f"{trial.name}/{job.name}")


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))


def _slug(label: str) -> str:
    plain = label.lower().replace("×", "x").replace("τ", "tau").replace("√", "root ")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
