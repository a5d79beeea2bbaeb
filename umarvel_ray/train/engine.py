"""The DeepSpeed engine: configuration, optimizer, and a training state that is independent of the number of ranks.

Every DeepSpeed default that matters is set here from the recipe. The learning rate is a pure function of the step and
the state consists of per-parameter fp32 tensors, so a checkpoint written by W ranks resumes on any other number.

Under `dtype: bfloat16` only frozen weights and the forward pass are bfloat16. What is trained is stored, accumulated
and reduced in fp32: DeepSpeed's own bf16 mode rounds log τ to increments of 1.6 % (docs/method.md#temperature-bounds),
accumulates the chunks' gradients in bfloat16, and under ZeRO-0 keeps its master copy where a resume cannot reach it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
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


def learning_rate(phase: Phase, step: int, total: int) -> float:
    """Linear warmup over `warmup_ratio` of the `total` steps, then cosine decay to zero (docs/method.md#training)."""
    warmup = math.ceil(phase.warmup_ratio * total)
    if step < warmup:
        return phase.peak_rate * (step + 1) / warmup
    return phase.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def deepspeed_config(phase: Phase, compute: Compute) -> dict[str, Any]:
    """DeepSpeed's configuration: ZeRO, gradient accumulation and clipping."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": phase.clip_norm if compute.zero_stage else 0.0,  # without ZeRO, see `make_engine`
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": compute.zero_stage, "overlap_comm": False, "contiguous_gradients": True},
        "steps_per_print": 10**9,
    }


def hold_in_fp32(module: torch.nn.Module) -> None:
    """Convert trainable parameters to fp32 in place, so that they are their own master copy."""
    for p in module.parameters():
        if p.requires_grad:
            p.data = p.data.float()


def make_engine(module: torch.nn.Module, phase: Phase, compute: Compute) -> deepspeed.DeepSpeedEngine:
    """Wrap a module in a DeepSpeed engine with AdamW over its parameters with `requires_grad`."""
    optimizer = torch.optim.AdamW(
        parameter_groups(module, phase), lr=phase.peak_rate, betas=phase.adam_betas, eps=phase.adam_eps
    )
    if compute.dtype == "bfloat16":
        device = get_accelerator().device_name()
        # Autocast's cache would keep a second copy of every weight under ZeRO-3.
        module.forward = torch.autocast(device, torch.bfloat16, cache_enabled=False)(module.forward)
    without_extensions()
    wrapped, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(phase, compute))
    trainable = [p for _, p in _trainable(wrapped)]
    if not compute.zero_stage:
        # DeepSpeed would clip here as well, but not report the norm.
        def clip(*_: object) -> None:
            set_gradient_norm(wrapped, torch.nn.utils.clip_grad_norm_(trainable, phase.clip_norm))

        optimizer.register_step_pre_hook(clip)
    reset_adam(wrapped, trainable, steps=0)
    return wrapped


def parameter_groups(module: torch.nn.Module, phase: Phase) -> list[dict[str, Any]]:
    """AdamW's parameter groups, the language model's first.

    Weight decay applies to matrices, not to biases, norms and the temperature. `relative_rate` is the part's own
    learning rate divided by the phase's.
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
    """Set the learning rate of the next step; parts with their own rate are scaled in proportion."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value * group["relative_rate"]


def start_step(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the learning rate and clear the gradients; call before a step's first backward pass."""
    set_learning_rate(engine, rate)
    clear_gradients(engine)


def take_step(engine: deepspeed.DeepSpeedEngine) -> float:
    """Update the parameters; returns the gradient norm before clipping, the same on all ranks, NaN if not finite.

    ZeRO silently skips an update that is not finite, so the caller must check the result.
    """
    engine.step()
    return float(engine.get_global_grad_norm()) if engine.was_step_applied() else math.nan


def keep_temperature(engine: deepspeed.DeepSpeedEngine, log_bounds: tuple[float, float]) -> None:
    """Put a learned log τ that a step has moved out of its bounds back onto the bound: beyond it has no gradient."""
    for name, p in _trainable(engine):
        if name.endswith("log_temperature"):
            value = _get(engine, p, "param")
            if not torch.equal(kept := value.clamp(*log_bounds), value):
                _set(engine, p, "param", kept)
                # ZeRO has set its own copy; the one that the model computes with follows only at the next step.
                with deepspeed.zero.GatheredParameters([p], 0, enabled=engine.zero_optimization_stage() == 3):
                    p.data.copy_(kept)


def capture(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """Trainable parameters and Adam moments as full fp32 CPU tensors on rank 0; a collective call under ZeRO.

    Keys: `param.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`. Other ranks return an empty dict, which saves them 12 bytes
    per parameter.
    """
    state: dict[str, torch.Tensor] = {}
    for name, p in _trainable(engine):
        for key in ("param", *MOMENTS):
            value = _get(engine, p, key)
            if dist.get_rank() == 0:
                state[f"{key}.{name}"] = value.detach().float().cpu().clone().contiguous()
    return state


def restore(engine: deepspeed.DeepSpeedEngine, state: Mapping[str, torch.Tensor], steps: int) -> None:
    """Load a captured state into a fresh engine; `steps` is the number of optimizer steps it was captured after.

    Looks up one tensor of the state at a time, and keeps none.
    """
    reset_adam(engine, [p for _, p in _trainable(engine)], steps)
    for name, p in _trainable(engine):
        for key in ("param", *MOMENTS):
            _set(engine, p, key, state[f"{key}.{name}"].to(engine.device))


def _get(engine: deepspeed.DeepSpeedEngine, p: torch.nn.Parameter, key: str) -> torch.Tensor:
    """A parameter, or one of its moments, as a whole tensor; a collective call under ZeRO."""
    if not engine.zero_optimization_stage():
        own: torch.Tensor = p.data if key == "param" else engine.basic_optimizer.state[p][key]
        return own
    full: torch.Tensor = safe_get_full_fp32_param(p) if key == "param" else safe_get_full_optimizer_state(p, key)
    return full


def _set(engine: deepspeed.DeepSpeedEngine, p: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
    """Set a parameter, or one of its moments, from a whole tensor."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        (p.data if key == "param" else engine.basic_optimizer.state[p][key]).copy_(value)
    elif stage == 3:
        # DeepSpeed's setters for full tensors do not handle a last partition that is all padding.
        own = own_partition(value, p)
        safe_set_local_fp32_param(p, own) if key == "param" else safe_set_local_optimizer_state(p, own, key)
    else:
        safe_set_full_fp32_param(p, value) if key == "param" else safe_set_full_optimizer_state(p, value, key)


def load_trainable(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy captured parameters into a plain module, before it is wrapped or to merge and save it; see `restore`."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.copy_(state[f"param.{name}"])


def _trainable(engine: deepspeed.DeepSpeedEngine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
