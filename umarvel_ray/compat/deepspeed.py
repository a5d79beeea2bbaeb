"""DeepSpeed internals without a public API: optimizer state, gradients and norms. For DeepSpeed 0.18 and 0.19."""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.nn import functional as F

from umarvel_ray.compat.private import private

_deepspeed = partial(private, "deepspeed", ">=0.18,<0.20")
_deepspeed("deepspeed.ops", "__compatible_ops__")
_deepspeed("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state")


def without_extensions() -> None:
    """Make DeepSpeed reduce between CPU ranks with torch.distributed; call before `deepspeed.initialize`.

    By default it compiles a shared-memory extension, which needs a C++ compiler and gives the same sums.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_gradient_norm(engine: deepspeed.DeepSpeedEngine, norm: torch.Tensor) -> None:
    """Set the result of `engine.get_global_grad_norm`, which DeepSpeed does not compute without ZeRO."""
    engine._global_grad_norm = norm


def clear_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Zero the gradients before a step under ZeRO-3; a no-op for the other ZeRO stages.

    ZeRO-3 never zeroes gradients; the first backward pass after a step overwrites them. A parameter with a gradient in
    later passes only (log τ) would add to the previous step's, and passes without a forward pass in between would all
    overwrite. With zeroed gradients and no pass counted as the first, every pass accumulates.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.grad_partitions_flat_buffer.zero_()
        engine.optimizer.micro_step_id = 1


def reset_adam(engine: deepspeed.DeepSpeedEngine, trainable: list[torch.nn.Parameter], steps: int) -> None:
    """Create zeroed Adam state, as after `steps` optimizer steps, before the first step.

    DeepSpeed 0.19 links the fragments of its flat state after the step of the first parameter group; a group without a
    gradient at that point (the temperature's) would get no state.
    """
    stage = engine.zero_optimization_stage()
    if stage == 0:
        flat = trainable
    else:
        zero = engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for p in flat:
        engine.basic_optimizer.state[p] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    if stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def own_partition(value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's slice of a whole tensor under ZeRO-3: slices have equal size, the last ones padded with zeros."""
    sharded: Any = parameter
    size = sharded.ds_tensor.numel()
    flat = value.flatten()
    padded = F.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
    return padded[size * dist.get_rank() :][:size]
