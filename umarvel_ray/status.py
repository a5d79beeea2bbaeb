"""`umarvel status RUN`: how far a run is, from its files only, so from any machine that sees its folder."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from umarvel_ray.data.plan import plan_length
from umarvel_ray.evaluate.charts import duration
from umarvel_ray.recipe import Recipe
from umarvel_ray.runs import Run, read_run_recipe, read_step_log

RECENT = 20  # steps that the time left is estimated from
DONE, RUNNING, STOPPED, WAITING, PLANNED = "done", "running", "stopped", "not started", "planned"
OUTPUTS = ("embeddings", "mined", "scores", "evaluation")
HEADER = ("phase", "", "step", "loss", "samples/s", "waiting", "left", "recall", "failures")


class PhaseStatus(NamedTuple):
    """One phase of training.

    Attributes:
        state: "done", "running", "stopped", "planned" (its batches are) or "not started".
        step, steps: optimizer steps taken, and of the whole phase (None before it is planned).
        loss, samples_per_s, waiting: of the last steps; waiting is the share of the time in which workers had no data.
        left_s: seconds that the steps left take at the pace of the last ones.
        recall: of the last state measured beside training (`evaluate.in_training`).
        failures: restarts of the worker group; last_failure: what happened, in one line.
    """

    name: str
    state: str
    step: int
    steps: int | None
    loss: float | None
    samples_per_s: float | None
    waiting: float | None
    left_s: float | None
    recall: float | None
    failures: int
    last_failure: str | None


class OutputStatus(NamedTuple):
    """A sharded output that is being written."""

    folder: str
    written: int
    shards: int


class Status(NamedTuple):
    """A run: whether a job works in it now, its phases in order, outputs that are not complete, seconds by part."""

    folder: str
    running: bool
    last_write_s: float | None
    phases: list[PhaseStatus]
    outputs: list[OutputStatus]
    times: dict[str, float]


def read_status(folder: Path) -> Status:
    """Read a run folder.

    Raises:
        UserError: not a run folder.
    """
    recipe = read_run_recipe(folder)
    run, running = Run(recipe, folder), _is_held(folder / ".lock")
    logs = list((folder / "train").glob("*/log.jsonl"))
    written = max((path.stat().st_mtime for path in logs), default=None)
    times = folder / "times.json"
    return Status(
        folder=str(folder),
        running=running,
        last_write_s=None if written is None else max(0.0, time.time() - written),
        phases=_phases(run, recipe, running),
        outputs=_outputs(folder),
        times=json.loads(times.read_text()) if times.exists() else {},
    )


def as_text(status: Status) -> str:
    """A table of the phases, and lines for everything else that there is to say."""
    ago = "" if status.last_write_s is None else f"; last step {duration(status.last_write_s)} ago"
    lines = [f"{status.folder}: {'a job is working in it' if status.running else 'no job is working in it'}{ago}"]
    rows = [_row(phase) for phase in status.phases]
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    for row in (HEADER, *rows):
        texts, numbers = row[:2], row[2:]
        cells = [text.ljust(width) for text, width in zip(texts, widths[:2], strict=True)]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines += [f"{phase.name}: last failure: {phase.last_failure}" for phase in status.phases if phase.last_failure]
    lines += [f"{one.folder}: {one.written} of {one.shards} shards" for one in status.outputs]
    if status.times:
        parts = ", ".join(f"{part} {duration(seconds)}" for part, seconds in status.times.items())
        lines.append(f"{duration(sum(status.times.values()))} so far: {parts}")
    return "\n".join(lines)


def as_json(status: Status) -> str:
    """All fields, nested as in `Status`."""
    nested = {"phases": [one._asdict() for one in status.phases], "outputs": [one._asdict() for one in status.outputs]}
    return json.dumps(status._asdict() | nested, indent=1)


def _phases(run: Run, recipe: Recipe, running: bool) -> list[PhaseStatus]:
    found = []
    for name in recipe.phases():
        folder = run.dir / "train" / name
        log, plan = read_step_log(folder / "log.jsonl"), folder / "plan.parquet"
        steps = plan_length(plan) if plan.exists() else None
        if run.has(name):
            state = DONE
        elif log:
            state = RUNNING if running else STOPPED
        else:
            state = PLANNED if steps else WAITING
        last = log[-RECENT:]
        seconds = sum(line["seconds"] for line in last)
        left = (steps - len(log)) * median(line["seconds"] for line in last) if last and steps else None
        failures = read_step_log(folder / "failures.jsonl")
        measured = read_step_log(folder / "in-training.jsonl")
        found.append(
            PhaseStatus(
                name=name,
                state=state,
                step=len(log),
                steps=steps,
                loss=last[-1]["loss"] if last else None,
                samples_per_s=sum(line["samples_per_s"] * line["seconds"] for line in last) / seconds if last else None,
                waiting=sum(line["wait_share"] * line["seconds"] for line in last) / seconds if last else None,
                left_s=None if state == DONE else left,
                recall=measured[-1]["recall"] if measured else None,
                failures=len(failures),
                last_failure=failures[-1]["error"] if failures and state != DONE else None,
            )
        )
    return found


def _outputs(folder: Path) -> list[OutputStatus]:
    """Outputs with a manifest that is not complete."""
    found = []
    for kind in OUTPUTS:
        for manifest in sorted((folder / kind).rglob("manifest.json")):
            facts = json.loads(manifest.read_text())
            if not facts.get("complete") and "shards" in facts:
                written = len(list(manifest.parent.glob("shard-*.parquet")))
                found.append(OutputStatus(str(manifest.parent.relative_to(folder)), written, facts["shards"]))
    return found


def _is_held(path: Path) -> bool:
    """Whether a job holds the run's lock, on this machine or on another one that shares locks with it."""
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _row(phase: PhaseStatus) -> Sequence[str]:
    def shown(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    steps = "" if phase.steps is None else f"{phase.step:,} of {phase.steps:,}"
    left = "" if phase.left_s is None else duration(phase.left_s)
    return (
        phase.name, phase.state, steps, shown(phase.loss, ".4f"), shown(phase.samples_per_s, ".1f"),
        shown(phase.waiting, ".0%"), left, shown(phase.recall, ".3f"), str(phase.failures or ""),
    )  # fmt: skip
