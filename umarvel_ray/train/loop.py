"""The training loop of every Ray Train worker: all phases of a stage in one worker group.

For each phase: build the model from its parent, resume from the last reported state, take the steps of the plan, and
let rank 0 merge the adapters and write the checkpoint that the next phase starts from.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import ray.train
import torch.distributed as dist

from umarvel_ray.data.plan import read_plan
from umarvel_ray.errors import UserError
from umarvel_ray.model.cpu import prepare_cpu
from umarvel_ray.model.packing import is_packed
from umarvel_ray.model.vision_cache import VisionCache
from umarvel_ray.recipe import RerankPhase
from umarvel_ray.train.build import build_module, model_of, save_merged
from umarvel_ray.train.embedding_step import Passes, TemperedEmbedder, VisualOf
from umarvel_ray.train.engine import (
    capture,
    keep_temperature,
    learning_rate,
    load_trainable,
    make_engine,
    restore,
    start_step,
    take_step,
)
from umarvel_ray.train.failures import check_finite, explain_out_of_memory
from umarvel_ray.train.frozen_tower import FrozenTower
from umarvel_ray.train.phases import VISION_CACHE_BYTES, PhaseSpec
from umarvel_ray.train.state import TrainState, open_state, phase_of
from umarvel_ray.train.step_log import StepLog
from umarvel_ray.train.steps import run_step
from umarvel_ray.train.stream import PhaseTables, begin, open_stream


def train_worker(config: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker; `config`: specs, tables by phase, tasks, cpus_per_task, threads, validated."""
    prepare_cpu(config["threads"])
    # Asked for once: later checkpoints are known to rank 0 only, and this one is deleted by then.
    checkpoint = ray.train.get_checkpoint()
    interrupted = phase_of(checkpoint)
    for spec in config["specs"]:
        if spec.error_path.exists():
            return  # an earlier attempt ended in a user error, which a retry cannot fix
        if not spec.done:
            try:
                resumed = checkpoint if spec.name == interrupted else None
                validated = config["validated"] and not isinstance(spec.phase, RerankPhase)
                tables, tasks, cpus = config["tables"][spec.name], config["tasks"], config["cpus_per_task"]
                _train_phase(spec, tables, tasks, cpus, resumed, validated)
            except UserError as error:
                # One of a preprocessing task is wrapped by Ray, together with its traceback.
                cause = getattr(error, "cause", error)
                spec.error_path.write_text(str(cause))
                raise UserError(str(cause)) from None
        dist.barrier()


def _train_phase(
    spec: PhaseSpec,
    tables: PhaseTables,
    tasks: int,
    cpus: float,
    resumed: ray.train.Checkpoint | None,
    validated: bool,
) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    plan = read_plan(spec.plan_path)
    with open_state(resumed) as state:
        first = state.steps
        stream = begin(open_stream(plan[first:], tables, rank, world, isinstance(spec.phase, RerankPhase), tasks, cpus))
        engine, visual_of = start_phase(spec, state)
    packed = is_packed(spec.compute.packed, engine.device)
    passes = Passes(spec.compute.token_budget, spec.compute.gradient_cache, packed)
    log = StepLog(spec.log_path, first) if rank == 0 else None
    clock = time.monotonic()
    for batch in stream:
        step = batch.plan.step
        waited = time.monotonic() - clock
        start_step(engine, learning_rate(spec.phase, step, len(plan)))
        engine.train()
        with explain_out_of_memory(spec, step, rank, batch.lengths, packed):
            loss, temperature, tokens = run_step(engine, spec, batch, passes, visual_of)
            grad_norm = take_step(engine)
            if isinstance(module := engine.module, TemperedEmbedder):
                keep_temperature(engine, module.log_bounds)
        check_finite(spec.name, batch.plan, tables, loss, grad_norm)
        seconds = time.monotonic() - clock
        clock = time.monotonic()
        metrics = {
            "step": step,
            "loss": loss,
            "temperature": temperature,
            "grad_norm": grad_norm,
            "learning_rate": engine.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
            "wait_share": waited / seconds,
            "samples_per_s": len(batch.plan.queries) / seconds,
            "tokens_per_s": tokens / seconds,
        }
        if log:
            log.write(metrics)
        if (step + 1) % spec.phase.checkpoint_every == 0 and step + 1 < len(plan):
            _report(spec.name, TrainState(step + 1, capture(engine)), metrics, validated)
    final = TrainState(len(plan), capture(engine))
    if log:
        log.close()
        save_merged(spec, final.tensors, metrics)
    engine.destroy()
    _report(spec.name, final, metrics, validated)


def start_phase(spec: PhaseSpec, state: TrainState) -> tuple[deepspeed.DeepSpeedEngine, VisualOf]:
    """The engine as it was after `state.steps` steps, and what gives it the features of pictures.

    A frozen tower is taken out of the module and cached; one that is trained, even in part, stays and runs in it.
    """
    module = build_module(spec, quantized=spec.phase.language_model == "qlora")
    if state.tensors:
        load_trainable(module, state.tensors)
    model = model_of(module)
    tower = FrozenTower(model.backbone, model.scale) if spec.phase.vision == "frozen" else None
    engine = make_engine(module, spec.phase, spec.compute)
    if state.tensors:
        restore(engine, state.tensors, state.steps)
    if tower is None:
        return engine, lambda pictures: None
    cache = VisionCache(VISION_CACHE_BYTES if spec.compute.cache_vision else 0)
    return engine, partial(cache.features, tower.to(engine.device))


def _report(phase: str, state: TrainState, metrics: dict[str, float], validated: bool) -> None:
    """Report to Ray Train, from rank 0 with a checkpoint, which is then measured in another process if `validated`."""
    if dist.get_rank():
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        state.save(phase, Path(folder))
        ray.train.report(metrics, ray.train.Checkpoint.from_directory(folder), validation=validated)
