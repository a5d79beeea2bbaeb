"""Run a table: every row is a run folder of its own that differs from the shared run in the ablated phase only.

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

from experiments.ablation.tables import Row, Table
from umarvel_ray import pipeline
from umarvel_ray.data.tables import Dataset, open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.checkpoints import evaluate_checkpoint
from umarvel_ray.evaluate.results import SCOPES, LadderResult
from umarvel_ray.model.checkpoint import CheckpointRef, read_provenance
from umarvel_ray.pipeline import Actors, PlannedPhase
from umarvel_ray.recipe import STAGE1, Evaluate, Recipe
from umarvel_ray.retrieve.metrics import hit_at_k, positives_of
from umarvel_ray.runs import Run
from umarvel_ray.train.launch import train_phases
from umarvel_ray.train.phases import PhaseSpec

DIVERGED = ": loss is "  # how train/loop.py begins to say it
COMMON = ("embeddings", "scores", "quarantine")  # what rows with the same seed need not compute twice

PLANS = {"stage1": pipeline.plan_stage1, "stage2": pipeline.plan_stage2, "stage3": pipeline.plan_stage3}

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


def build_shared(shared: Run, table: Table, actors: Actors) -> int | None:
    """Make the checkpoints that all rows start from with the ordinary stages, unless they are there.

    Returns:
        The seed that they say they were trained with; None where rows start from the base.

    Raises:
        UserError: the recipe leaves a phase out that the table is about.
    """
    if any(not shared.has(phase) for phase in table.shared if phase in STAGE1):
        pipeline.train_stage1(shared)
    if any(not shared.has(phase) for phase in table.shared):
        pipeline.train_stage2_and_reranker(shared, actors)
    for phase in table.shared:
        shared.parent(phase, f"table {table.number}")
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
        for phase in table.shared:
            _link(run.checkpoint(phase), shared.checkpoint(phase))
        for name in COMMON:
            common = home / "common" / f"seed-{seed}" / name
            common.mkdir(parents=True, exist_ok=True)
            _link(run.dir / name, common)
        trials.append(Trial(row, seed, run))
    return trials


def train(shared: Run, table: Table, trials: Sequence[Trial], actors: Actors) -> None:
    """Train what is not finished. A row whose loss runs off is left behind with its error; the others go on.

    Raises:
        UserError: what stops all rows, such as a full disk.
    """
    plan = PLANS[table.stage]
    while todo := [t for t in trials if not t.run.has(table.phase) and not t.failure]:
        planned: list[PlannedPhase] = []
        for trial in todo:
            stage = plan(trial.run, actors)
            planned += [PlannedPhase(_renamed(spec, trial), queries) for spec, queries in stage.phases if not spec.done]
        queries = {spec.name: table_ for spec, table_ in planned}
        group = f"table-{table.number}-seed-{todo[0].seed}"
        specs, documents = [spec for spec, _ in planned], stage.data.documents
        try:
            train_phases(group, specs, queries, documents, shared.recipe.cluster, shared.dir / "ablations")
        except UserError:
            if not any(trial.failure for trial in todo):
                raise


def measure(trial: Trial, table: Table, data: Dataset, actors: Actors) -> Outcome:
    """Evaluate a trial, or read back its evaluation."""
    if trial.failure:
        return Outcome({}, {}, trial.failure)
    return measure_checkpoint(trial.run, table.phase, data, actors)


def measure_checkpoint(run: Run, phase: str, data: Dataset, actors: Actors) -> Outcome:
    """Evaluate the checkpoint of a ladder phase in a run's folder, or read back its evaluation."""
    result = evaluate_checkpoint(
        actors.embedders,
        data,
        run.recipe,
        CheckpointRef.of(run.checkpoint(phase)),
        phase,
        run.dir / "evaluation" / phase,
    )
    average = {"local": result.local["average"], "global": result.global_["average"]}
    return Outcome(average, hits_of(result, data, run.recipe.evaluate))


def hits_of(result: LadderResult, data: Dataset, settings: Evaluate) -> Hits:
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


def _renamed(spec: PhaseSpec, trial: Trial) -> PhaseSpec:
    """Ray Train and the progress bars tell the phases of a group apart by name."""
    return spec._replace(name=f"{trial.name}/{spec.name}")


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))


def _slug(label: str) -> str:
    plain = label.lower().replace("×", "x").replace("τ", "tau").replace("√", "root ")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
