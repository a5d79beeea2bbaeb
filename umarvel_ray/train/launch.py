"""The Ray Train shell: one worker group per stage, restarted on failure, resumed after a killed driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from umarvel_ray.data.plan import read_plan
from umarvel_ray.errors import UserError
from umarvel_ray.progress import progress
from umarvel_ray.recipe import Cluster
from umarvel_ray.runs import read_step_log
from umarvel_ray.train.failures import describe, record_failure, under_way
from umarvel_ray.train.phases import PhaseSpec
from umarvel_ray.train.stream import Tables


def train_phases(
    stage: str,
    specs: Sequence[PhaseSpec],
    queries: dict[str, pa.Table],
    documents: pa.Table,
    cluster: Cluster,
    run_dir: Path,
) -> None:
    """Train phases in order in one worker group; done ones are skipped, a half-done one resumes at its last checkpoint.

    Args:
        stage: name of the Ray Train run, under `run_dir/train_state`.
        queries: the query table of each phase, by its name.

    Raises:
        UserError: the workers' own one-line error, or the failure budget is used up.
    """
    todo = [spec for spec in specs if not spec.done]
    if not todo:
        return
    for spec in todo:
        spec.error_path.unlink(missing_ok=True)
    corpus = ray.put(documents)
    processor = todo[0].parent  # later parents do not exist yet; all share its tokenizer
    tables = {spec.name: Tables(ray.put(queries[spec.name]), corpus, processor, spec.settings) for spec in todo}
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "specs": list(todo),
            "tables": tables,
            "tasks": max(1, cluster.preprocess_tasks // cluster.workers),
            "cpus_per_task": 1 if cluster.gpus_per_worker else 0.5,
            "threads": max(1, int(cluster.cpus_per_worker)),
        },
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker}
            | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=stage,
            storage_path=str(run_dir / "train_state"),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[_FailureLog(todo)],
        ),
    )
    finished = threading.Event()
    follower = threading.Thread(target=_follow, args=(todo, finished), daemon=True)
    follower.start()
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        raise UserError(_user_error(todo) or _used_up(stage, todo, error)) from error
    finally:
        finished.set()
        follower.join()
    if error := _user_error(todo):
        raise UserError(error)


def _train_worker(config: dict[str, Any]) -> None:
    # Imported on the worker: neither the driver nor Ray Train's controller needs DeepSpeed and the model.
    from umarvel_ray.train.loop import train_worker

    train_worker(config)


def _user_error(specs: Sequence[PhaseSpec]) -> str | None:
    """The user error recorded by a worker."""
    return next((spec.error_path.read_text() for spec in specs if spec.error_path.exists()), None)


def _follow(specs: Sequence[PhaseSpec], finished: threading.Event) -> None:
    for spec in specs:
        with progress(len(read_plan(spec.plan_path)), f"train {spec.name}", "step") as bar:
            shown = 0
            while not finished.is_set() and not spec.done:
                time.sleep(1)
                done = len(read_step_log(spec.log_path))
                bar.update(max(0, done - shown))
                shown = max(shown, done)
        if finished.is_set() and not spec.done:
            return


class _FailureLog(UserCallback):
    """Writes down every failure of the worker group, from Ray Train's controller: a lost worker cannot tell its own."""

    def __init__(self, specs: Sequence[PhaseSpec]) -> None:
        self.specs = list(specs)

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        with suppress(OSError):  # a full disk may be the failure
            record_failure(self.specs, worker_exceptions)


def _used_up(stage: str, specs: Sequence[PhaseSpec], error: ray.train.WorkerGroupError) -> str:
    path = under_way(specs).failures_path
    where = f"; failures and their items are in {path}" if path.exists() else ""
    return f"{describe(error.worker_failures)} (stage {stage}: cluster.max_failures is used up{where})"
