"""The driver of training: one Ray Train worker group per stage, restarted on failure, resumed if the driver dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback, ValidationConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util import placement_group_table

from umarvel_ray.data.plan import plan_length
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.errors import UserError
from umarvel_ray.progress import progress
from umarvel_ray.recipe import Cluster
from umarvel_ray.runs import read_step_log
from umarvel_ray.train.failures import current_phase, describe, record_failure
from umarvel_ray.train.phases import PhaseSpec
from umarvel_ray.train.stream import PhaseTables
from umarvel_ray.waiting import SAY_EVERY, require_room, resources, say_waiting


def train_phases(
    stage: str,
    specs: Sequence[PhaseSpec],
    queries: dict[str, StoredTable],
    documents: StoredTable,
    cluster: Cluster,
    run_dir: Path,
    validation: ValidationConfig | None = None,
) -> None:
    """Train phases in order in one worker group. Finished ones are skipped; an interrupted one resumes.

    Args:
        stage: name of the Ray Train run, under `run_dir/train_state`.
        queries: the query table of each phase, by the phase's name.
        validation: measures the states of embedders that are saved, in a task beside the workers.

    Raises:
        UserError: a worker's own one-line error, or `cluster.max_failures` is used up.
    """
    todo = [spec for spec in specs if not spec.done]
    if not todo:
        return
    for spec in todo:
        spec.error_path.unlink(missing_ok=True)
    trainer = _trainer(stage, todo, _tables(todo, queries, documents), cluster, run_dir, validation)
    with _progress_of(todo), _saying_what_it_waits_for(stage, cluster):
        try:
            trainer.fit()
        except ray.train.WorkerGroupError as error:
            raise UserError(_user_error(todo) or _last_failure(stage, todo, error)) from error
    if message := _user_error(todo):
        raise UserError(message)


def _tables(
    specs: Sequence[PhaseSpec], queries: dict[str, StoredTable], documents: StoredTable
) -> dict[str, PhaseTables]:
    """The tables of each phase, by the phase's name."""
    processor = specs[0].parent  # later parents do not exist yet; all have the same tokenizer
    return {spec.name: PhaseTables(queries[spec.name], documents, processor, spec.settings) for spec in specs}


def _trainer(
    stage: str,
    specs: Sequence[PhaseSpec],
    tables: dict[str, PhaseTables],
    cluster: Cluster,
    run_dir: Path,
    validation: ValidationConfig | None,
) -> TorchTrainer:
    return TorchTrainer(
        _train_worker,
        train_loop_config={
            "specs": list(specs),
            "tables": tables,
            "tasks": max(1, cluster.preprocess_tasks // cluster.workers),
            "cpus_per_task": 1 if cluster.gpus_per_worker else 0.5,
            "threads": max(1, int(cluster.cpus_per_worker)),
            "validated": validation is not None,
        },
        validation_config=validation,
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources(cluster.cpus_per_worker, cluster.gpus_per_worker),
        ),
        run_config=RunConfig(
            name=stage,
            storage_path=str(run_dir / "train_state"),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[_FailureLog(specs, tables)],  # type: ignore[list-item]
        ),
    )


def _train_worker(config: dict[str, Any]) -> None:
    # Imported on the worker: the driver and Ray Train's controller need neither DeepSpeed nor the model.
    from umarvel_ray.train.loop import train_worker

    train_worker(config)


def _user_error(specs: Sequence[PhaseSpec]) -> str | None:
    """The user error recorded by a worker."""
    return next((spec.error_path.read_text() for spec in specs if spec.error_path.exists()), None)


@contextmanager
def _progress_of(specs: Sequence[PhaseSpec]) -> Iterator[None]:
    """Show the progress of phases, as their step logs grow, from another thread."""
    finished = threading.Event()
    follower = threading.Thread(target=_follow, args=(specs, finished), daemon=True)
    follower.start()
    try:
        yield
    finally:
        finished.set()
        follower.join()


def _follow(specs: Sequence[PhaseSpec], finished: threading.Event) -> None:
    for spec in specs:
        with progress(plan_length(spec.plan_path), f"train {spec.name}", "step") as bar:
            shown = 0
            while not finished.is_set() and not spec.done:
                time.sleep(1)
                done = len(read_step_log(spec.log_path))
                bar.update(max(0, done - shown))
                shown = max(shown, done)
        if finished.is_set() and not spec.done:
            return


@contextmanager
def _saying_what_it_waits_for(stage: str, cluster: Cluster) -> Iterator[None]:
    """Say at once that workers are awaited, and from another thread again while Ray has no room for them."""
    needs = resources(cluster.cpus_per_worker, cluster.gpus_per_worker)
    asked = (stage, cluster.workers, "workers", needs, "cluster.workers")
    require_room(*asked)
    say = partial(say_waiting, *asked)
    say()
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(SAY_EVERY):
            if _is_pending([needs] * cluster.workers):
                say()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _is_pending(bundles: Sequence[dict[str, float]]) -> bool:
    """Whether a placement group of these bundles, in which Ray Train starts its workers, waits for room."""
    return any(
        group["state"] == "PENDING" and list(group["bundles"].values()) == list(bundles)
        for group in placement_group_table().values()
    )


class _FailureLog(UserCallback):
    """Records every failure of the worker group from Ray Train's controller: a lost worker cannot report its own."""

    def __init__(self, specs: Sequence[PhaseSpec], tables: dict[str, PhaseTables]) -> None:
        self.specs, self.tables = list(specs), tables

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        with suppress(OSError):  # the failure may be a full disk
            record_failure(self.specs, self.tables, worker_exceptions)


def _last_failure(stage: str, specs: Sequence[PhaseSpec], error: ray.train.WorkerGroupError) -> str:
    path = current_phase(specs).failures_path
    where = f"; failures and their items are in {path}" if path.exists() else ""
    return f"{describe(error.worker_failures)} (stage {stage}: cluster.max_failures is used up{where})"
