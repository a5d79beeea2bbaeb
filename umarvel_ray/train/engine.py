"""The DeepSpeed engine: the optimiser boundary, and its state in a form that no world size is baked into.

Every DeepSpeed default that matters is set here from the recipe. The learning rate is a pure function of the step, the
state is per-parameter fp32 tensors, so a checkpoint written by W ranks resumes on any other number (rule 5).

Under `dtype: bfloat16` only frozen weights and the forward pass are bfloat16. What trains is held, accumulated and
reduced in fp32: DeepSpeed's own bf16 mode rounds log τ in the loss to steps of 1.6 % (trap T15), adds the chunks'
gradients up in bfloat16, and keeps its master copy where a resume cannot reach it under ZeRO-0.
"""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from umarvel_ray.compat.deepspeed import (
    clear_gradients,
    own_partition,
    reset_adam,
    set_gradient_norm,
    without_extensions,
)
from umarvel_ray.model.trainable import PARTS, part_of
from umarvel_ray.recipe import Compute, Phase

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(phase: Phase, number: int, total: int) -> float:
    """Linear warm-up over `warmup_ratio` of the run, then cosine to zero (method section 2)."""
    warmup = math.ceil(phase.warmup_ratio * total)
    if number < warmup:
        return phase.peak_rate * (number + 1) / warmup
    return phase.peak_rate * 0.5 * (1 + math.cos(math.pi * (number - warmup) / max(1, total - warmup)))


def deepspeed_config(phase: Phase, compute: Compute) -> dict[str, Any]:
    """ZeRO, precision, clipping and reduction, spelled out."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": phase.clip_norm if compute.zero_stage else 0.0,  # without ZeRO: `make_engine`
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": compute.zero_stage, "overlap_comm": False, "contiguous_gradients": True},
        "steps_per_print": 10**9,
    }


def hold_in_fp32(module: torch.nn.Module) -> None:
    """What trains is its own fp32 master copy, in place."""
    for p in module.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def make_engine(module: torch.nn.Module, phase: Phase, compute: Compute) -> deepspeed.DeepSpeedEngine:
    """Wrap a module whose trainable parameters are its `requires_grad` ones."""
    optimizer = torch.optim.AdamW(
        parameter_groups(module, phase), lr=phase.peak_rate, betas=phase.adam_betas, eps=phase.adam_eps
    )
    if compute.dtype == "bfloat16":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Without autocast's cache, which would keep a second copy of every weight under ZeRO-3.
        module.forward = torch.autocast(device, torch.bfloat16, cache_enabled=False)(module.forward)
    without_extensions()
    wrapped, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(phase, compute))
    trainable = [p for _, p in _trainable(wrapped)]
    if not compute.zero_stage:
        # DeepSpeed would clip here too, but not report the norm.
        def clip(*_) -> None:
            set_gradient_norm(wrapped, torch.nn.utils.clip_grad_norm_(trainable, phase.clip_norm))

        optimizer.register_step_pre_hook(clip)
    reset_adam(wrapped, trainable, steps=0)
    return wrapped


def parameter_groups(module: torch.nn.Module, phase: Phase) -> list[dict[str, Any]]:
    """AdamW's groups, the language model's first: matrices decay; biases, norms and the temperature do not.

    `relative_rate` is a part's own learning rate over the phase's.
    """
    rates = phase.learning_rates.model_dump()
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            groups.setdefault((part_of(name), p.ndim > 1), []).append(p)
    return [
        {
            "params": groups[part, decays],
            "weight_decay": phase.weight_decay if decays else 0.0,
            "relative_rate": (rates.get(part) or phase.learning_rate) / phase.learning_rate,
        }
        for part in PARTS
        for decays in (True, False)
        if (part, decays) in groups
    ]


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, value: float) -> None:
    """The rate of the next optimiser step; parts with a rate of their own get theirs in proportion."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value * group["relative_rate"]


def start_step(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the learning rate and clear the gradients, before a step's first backward pass."""
    set_learning_rate(engine, rate)
    clear_gradients(engine)


def take_step(engine: deepspeed.DeepSpeedEngine) -> float:
    """Update the parameters; returns the gradient's norm before clipping, alike on all ranks, NaN if it is not finite.

    ZeRO skips an update that is not finite and goes on: the caller must look at what this returns.
    """
    engine.step()
    return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan


def capture(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Trainable parameters and Adam moments as full fp32 CPU tensors, on rank 0 alone (a collective call under ZeRO).

    Keys: `param.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`; no other rank keeps what may be twelve bytes a parameter.
    """
    state = {}
    for name, p in _trainable(engine):
        if engine.zero_optimization_stage():
            values = [safe_get_full_fp32_param(p), *(safe_get_full_optimizer_state(p, key) for key in MOMENTS)]
        else:
            values = [p.data, *(engine.basic_optimizer.state[p][key] for key in MOMENTS)]
        if dist.get_rank() == 0:
            for key, value in zip(("param", *MOMENTS), values, strict=True):
                state[f"{key}.{name}"] = value.detach().float().cpu().clone().contiguous()
    return state


def restore(engine: deepspeed.DeepSpeedEngine, state: dict[str, torch.Tensor], steps: int) -> None:
    """Put a captured state back into a fresh engine; `steps` is how many optimiser steps it had taken."""
    reset_adam(engine, [p for _, p in _trainable(engine)], steps)
    stage = engine.zero_optimization_stage()
    for name, p in _trainable(engine):
        values = {key: state[f"{key}.{name}"].to(engine.device) for key in ("param", *MOMENTS)}
        if stage == 3:
            # DeepSpeed's full setters do not reckon with a last partition that is padding.
            own = {key: own_partition(value, p) for key, value in values.items()}
            safe_set_local_fp32_param(p, own["param"])
            for key in MOMENTS:
                safe_set_local_optimizer_state(p, own[key], key)
        elif stage:
            safe_set_full_fp32_param(p, values["param"])
            for key in MOMENTS:
                safe_set_full_optimizer_state(p, values[key], key)
        else:
            for key in MOMENTS:
                engine.basic_optimizer.state[p][key].copy_(values[key])


def load_trainable(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copy captured parameters into a plain module (before it is wrapped, or to merge and save it)."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.copy_(state[f"param.{name}"])


def _trainable(engine: deepspeed.DeepSpeedEngine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
