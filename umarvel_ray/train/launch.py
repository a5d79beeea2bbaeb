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

from umarvel_ray.data.plan import Tables, read_plan
from umarvel_ray.errors import UserError
from umarvel_ray.progress import progress
from umarvel_ray.recipe import Cluster
from umarvel_ray.train.failures import describe, record_failure, under_way
from umarvel_ray.train.jobs import TrainJob
from umarvel_ray.train.log import read_log


def run_jobs(
    stage: str,
    jobs: Sequence[TrainJob],
    queries: dict[str, pa.Table],
    documents: pa.Table,
    cluster: Cluster,
    run_dir: Path,
) -> None:
    """Run jobs in order in one worker group; done ones are skipped, a half-done one resumes at its last checkpoint.

    Args:
        stage: name of the Ray Train run, under `run_dir/train_state`.
        queries: the query table of each job, by job name.

    Raises:
        UserError: the workers' own one-line error, or the failure budget is used up.
    """
    todo = [job for job in jobs if not job.done]
    if not todo:
        return
    for job in todo:
        job.error_path.unlink(missing_ok=True)
    corpus = ray.put(documents)
    processor = todo[0].parent  # later parents do not exist yet; all share its tokenizer
    tables = {job.name: Tables(ray.put(queries[job.name]), corpus, processor, job.settings) for job in todo}
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "jobs": list(todo),
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
        raise UserError(_told(todo) or _used_up(stage, todo, error)) from error
    finally:
        finished.set()
        follower.join()
    if told := _told(todo):
        raise UserError(told)


def _train_worker(config: dict[str, Any]) -> None:
    # Imported on the worker: neither the driver nor Ray Train's controller needs DeepSpeed and the model.
    from umarvel_ray.train.loop import train_worker

    train_worker(config)


def _told(jobs: Sequence[TrainJob]) -> str | None:
    """The error of a user's that a worker wrote down."""
    return next((job.error_path.read_text() for job in jobs if job.error_path.exists()), None)


def _follow(jobs: Sequence[TrainJob], finished: threading.Event) -> None:
    for job in jobs:
        with progress(len(read_plan(job.plan_path)), f"train {job.name}", "step") as bar:
            shown = 0
            while not finished.is_set() and not job.done:
                time.sleep(1)
                done = len(read_log(job.log_path)) if job.log_path.exists() else 0
                bar.update(max(0, done - shown))
                shown = max(shown, done)
        if finished.is_set() and not job.done:
            return


class _FailureLog(UserCallback):
    """Writes down every failure of the worker group, from Ray Train's controller: a lost worker cannot tell its own."""

    def __init__(self, jobs: Sequence[TrainJob]) -> None:
        self.jobs = list(jobs)

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        with suppress(OSError):  # a full disk may be the failure
            record_failure(self.jobs, worker_exceptions)


def _used_up(stage: str, jobs: Sequence[TrainJob], error: ray.train.WorkerGroupError) -> str:
    path = under_way(jobs).failures_path
    where = f"; failures and their items are in {path}" if path.exists() else ""
    return f"{describe(error.worker_failures)} (stage {stage}: cluster.max_failures is used up{where})"
