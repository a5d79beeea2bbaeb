"""The training loop that every Ray Train worker runs: all optimisation runs of a stage in one worker group.

For each spec: build the model from its parent, resume where the last checkpoint stands, walk the plan, and let rank 0
merge the adapter and write the checkpoint directory that the next spec starts from.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from umarvel_ray.data.plan import read_plan
from umarvel_ray.errors import UserError
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.packing import is_packed
from umarvel_ray.model.reranker import RerankerModel
from umarvel_ray.model.vision_cache import VisionCache
from umarvel_ray.recipe import RerankPhase
from umarvel_ray.train.build import build_module, model_of, save_merged
from umarvel_ray.train.embedding_step import Passes, VisualOf
from umarvel_ray.train.engine import (
    capture,
    learning_rate,
    load_trainable,
    make_engine,
    restore,
    start_step,
    take_step,
)
from umarvel_ray.train.failures import check_finite, memory_watched
from umarvel_ray.train.frozen_tower import FrozenTower
from umarvel_ray.train.phases import VISION_CACHE_BYTES, PhaseSpec
from umarvel_ray.train.step_log import StepLog
from umarvel_ray.train.steps import run_step
from umarvel_ray.train.stream import Tables, open_stream

STATE, POSITION = "state.safetensors", "position.txt"

State = dict[str, torch.Tensor]


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker; `config`: specs, tables (by phase name), tasks, cpus_per_task, threads."""
    torch.set_num_threads(config["threads"])
    resumed = _resume_point(config["specs"])
    for spec in config["specs"]:
        if spec.error_path.exists():
            return  # a try before this one ended in an error of the user's, which no retry mends
        if not spec.done:
            try:
                start, state = resumed.pop(spec.name, (0, None))
                _run(spec, config["tables"][spec.name], config["tasks"], config["cpus_per_task"], start, state)
            except UserError as error:
                spec.error_path.write_text(str(error))
                raise
        dist.barrier()


def _run(spec: PhaseSpec, tables: Tables, tasks: int, cpus: float, start: int, state: State | None) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = read_plan(spec.plan_path)
    module = build_module(spec, quantized=spec.phase.language_model == "qlora")
    if state:
        load_trainable(module, state)
    visual_of = _visual_of(spec, model_of(module))
    engine = make_engine(module, spec.phase, spec.compute)
    if state:
        restore(engine, state, start)
    packed = is_packed(spec.compute.packed, engine.device)
    passes = Passes(spec.compute.token_budget, spec.compute.gradient_cache, packed)
    stream = open_stream(plan[start:], tables, rank, world, isinstance(spec.phase, RerankPhase), tasks, cpus)
    log = StepLog(spec.log_path, start) if rank == 0 else None
    clock = time.monotonic()
    for batch in stream:
        number = batch.plan.step
        waited = time.monotonic() - clock
        start_step(engine, learning_rate(spec.phase, number, len(plan)))
        engine.train()
        with memory_watched(spec, number, rank, batch.lengths, packed):
            loss, temperature, tokens = run_step(engine, spec, batch, passes, visual_of)
            grad_norm = take_step(engine)
        check_finite(spec.name, batch.plan, loss, grad_norm)
        seconds = time.monotonic() - clock
        clock = time.monotonic()
        metrics = {
            "step": number,
            "loss": loss,
            "temperature": temperature,
            "grad_norm": grad_norm,
            "learning_rate": engine.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "wait_share": waited / seconds,
            "samples_per_s": len(batch.plan.query_ids) / seconds,
            "tokens_per_s": tokens / seconds,
        }
        if log:
            log.write(metrics)
        if (number + 1) % spec.phase.checkpoint_every == 0 and number + 1 < len(plan):
            _report(spec.name, number + 1, capture(engine), metrics)
    state = capture(engine)
    if log:
        log.close()
        save_merged(spec, state, metrics)
    engine.destroy()
    _report(spec.name, len(plan), state, metrics)


def _visual_of(spec: PhaseSpec, model: EmbeddingModel | RerankerModel) -> VisualOf:
    """A frozen tower leaves the module and is cached; one that trains, in any part, stays and runs with it."""
    if spec.phase.vision != "frozen":
        return lambda pictures: None
    tower = FrozenTower(model.backbone, model.scale, "cuda" if torch.cuda.is_available() else "cpu")
    return partial(VisionCache(VISION_CACHE_BYTES if spec.compute.cache_vision else 0).features, tower)


def _resume_point(specs: Sequence[PhaseSpec]) -> dict[str, tuple[int, State]]:
    """Where the spec that was under way stands, by its name.

    Asked once, as the group starts: all ranks but the first are told of no later checkpoint, and this one goes.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {}
    with checkpoint.as_directory() as folder:
        name, position = (Path(folder) / POSITION).read_text().split()
        if all(spec.done or spec.name != name for spec in specs):
            return {}
        return {name: (int(position), load_file(Path(folder) / STATE))}


def _report(name: str, position: int, state: State, metrics: dict[str, float]) -> None:
    if dist.get_rank():
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / STATE)
        (Path(folder) / POSITION).write_text(f"{name} {position}")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
