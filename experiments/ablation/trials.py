"""Run a table: every row has its own run folder, which differs from the shared run only in the ablated stage.

The rows of a table train in one worker group and are embedded by one actor group. Finished work is not repeated: a
killed table resumes in the middle of the row where it stopped.
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
from umarvel_ray.data.dataset import Dataset
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.checkpoints import evaluate_checkpoint
from umarvel_ray.evaluate.results import SCOPES, LadderResult
from umarvel_ray.model.checkpoint import CheckpointRef, read_provenance
from umarvel_ray.pipeline import Actors, PlannedPhase
from umarvel_ray.recipe import STAGE1, Evaluate, Recipe
from umarvel_ray.retrieve.metrics import by_task, find_hits, k_of, recall_at_k
from umarvel_ray.runs import Run
from umarvel_ray.train.failures import NOT_FINITE, last_failure
from umarvel_ray.train.launch import train_phases
from umarvel_ray.train.phases import PhaseSpec

COMMON = ("embeddings", "scores", "quarantine")  # folders that rows with the same seed share
TABLES = "tables"  # folder that all rows share with the run: the converted data

PLANS = {"stage1": pipeline.plan_stage1, "stage2": pipeline.plan_stage2, "stage3": pipeline.plan_stage3}

# (row, seed, folder) → the row's recipe
Variant = Callable[[Row, int, Path], Recipe]
Hits = dict[str, dict[str, np.ndarray]]  # scope → task → (n,), 1 for a query that found a positive


@dataclass(frozen=True)
class Trial:
    """A row with a seed, in its own run folder."""

    row: Row
    seed: int
    run: Run

    @property
    def name(self) -> str:
        return self.run.dir.name

    @property
    def failure(self) -> str | None:
        """The error that ended training because the loss diverged; remove the folder to try again."""
        for folder in sorted(self.run.dir.glob("train/*/")):
            failure = None if self.run.has(folder.name) else last_failure(folder)
            if failure and failure["kind"] == NOT_FINITE:
                return str(failure["error"])
        return None


@dataclass(frozen=True)
class Outcome:
    """Average recall by scope and the hits behind it, or why a trial has no score."""

    average: dict[str, float]
    hits: Hits
    failure: str | None = None


def build_shared(shared: Run, table: Table, actors: Actors) -> int | None:
    """Train the checkpoints that all rows start from, if missing, with the ordinary stages.

    Returns:
        The seed stored in them; None where rows start from the base.

    Raises:
        UserError: the recipe leaves out a phase that the table needs.
    """
    if any(not shared.has(phase) for phase in table.shared if phase in STAGE1):
        pipeline.train_stage1(shared)
    if any(not shared.has(phase) for phase in table.shared):
        pipeline.train_stage2_and_reranker(shared, actors)
    for phase in table.shared:
        shared.parent(phase, f"table {table.number}")
    return read_provenance(shared.checkpoint(table.shared[0]))["recipe"]["seed"] if table.shared else None


def open_trials(shared: Run, table: Table, variant: Variant, seed: int) -> list[Trial]:
    """Run folders of the rows that train, with links to the folders they share.

    Raises:
        UserError: a folder was made by a different recipe.
    """
    home = shared.dir / "ablations"
    (shared.dir / TABLES).mkdir(exist_ok=True)
    trials = []
    for row in table.rows:
        if row.changes is None:
            continue
        folder = home / f"table-{table.number}" / f"{_slug(row.label)}-seed-{seed}"
        run = Run.open(variant(row, seed, folder))
        _link(run.dir / TABLES, shared.dir / TABLES)
        for phase in table.shared:
            _link(run.checkpoint(phase), shared.checkpoint(phase))
        for name in COMMON:
            common = home / "common" / f"seed-{seed}" / name
            common.mkdir(parents=True, exist_ok=True)
            _link(run.dir / name, common)
        trials.append(Trial(row, seed, run))
    return trials


def train(shared: Run, table: Table, trials: Sequence[Trial], actors: Actors) -> None:
    """Train the rows that are not finished. A row whose loss diverges keeps its error; the others continue.

    Raises:
        UserError: an error that stops all rows, such as a full disk.
    """
    plan = PLANS[table.stage]
    while pending := [t for t in trials if not t.run.has(table.phase) and not t.failure]:
        planned: list[PlannedPhase] = []
        for trial in pending:
            stage = plan(trial.run, actors)
            planned += [PlannedPhase(_renamed(spec, trial), queries) for spec, queries in stage.phases if not spec.done]
        queries = {spec.name: rows for spec, rows in planned}
        group = f"table-{table.number}-seed-{pending[0].seed}"
        specs, documents = [spec for spec, _ in planned], stage.documents
        try:
            train_phases(group, specs, queries, documents, shared.recipe.cluster, shared.dir / "ablations")
        except UserError:
            if not any(trial.failure for trial in pending):
                raise


def measure(trial: Trial, table: Table, data: Dataset, actors: Actors) -> Outcome:
    """Evaluate a trial, or read its finished evaluation."""
    if trial.failure:
        return Outcome({}, {}, trial.failure)
    return measure_checkpoint(trial.run, table.phase, data, actors)


def measure_checkpoint(run: Run, phase: str, data: Dataset, actors: Actors) -> Outcome:
    """Evaluate the checkpoint of a phase in a run folder, or read its finished evaluation."""
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
    """Which queries found a positive in their first k, in the order of the query table; 0 without a ranking."""
    queries = data.queries(settings.split)
    k = k_of(queries, settings)
    found = {scope: recall_at_k(find_hits(result.ranking(scope), queries), k) for scope in SCOPES}
    return {scope: by_task(of_query, queries) for scope, of_query in found.items()}


def evaluation_data(run: Run) -> Dataset:
    """The data, with its evaluation split checked."""
    data = run.open_dataset()
    data.validate(run.recipe.evaluate.split)
    return data


def _renamed(spec: PhaseSpec, trial: Trial) -> PhaseSpec:
    """Ray Train and the progress bars identify the phases of a group by name."""
    return spec._replace(name=f"{trial.name}/{spec.name}")


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))


def _slug(label: str) -> str:
    plain = label.lower().replace("×", "x").replace("τ", "tau").replace("√", "root ")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
