"""DeepSpeed's optimizer state, and its own bookkeeping of gradients and norms, which it offers no public call for.

Written against DeepSpeed 0.18 and 0.19.
"""

from __future__ import annotations

from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch.nn import functional as F

from umarvel_ray.compat.private import private

_deepspeed = partial(private, "deepspeed", ">=0.18,<0.20")
_deepspeed("deepspeed.ops", "__compatible_ops__")
_deepspeed("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state")


def without_extensions() -> None:
    """Have DeepSpeed reduce between CPU ranks through torch.distributed.

    It would compile a shared-memory extension for that, which needs a C++ compiler and gives the same sums.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_gradient_norm(engine: deepspeed.DeepSpeedEngine, norm: torch.Tensor) -> None:
    """What `engine.get_global_grad_norm` returns; without ZeRO DeepSpeed does not compute it."""
    engine._global_grad_norm = norm


def clear_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Start a step's gradients from zero under ZeRO-3; nothing to do under the others.

    DeepSpeed clears no gradient there: the first backward pass after a step overwrites it. So one that a parameter gets
    in a later pass alone (log τ) would add to the last step's, and passes without a forward between them would all
    overwrite. From zero, and never "first", they add up.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.grad_partitions_flat_buffer.zero_()
        engine.optimizer.micro_step_id = 1


def reset_adam(engine: deepspeed.DeepSpeedEngine, trainable: list[torch.nn.Parameter], steps: int) -> None:
    """Zero Adam state after `steps` steps, created before the first one.

    DeepSpeed 0.19 links the fragments of its flat state once the first parameter group has stepped; a group that gets
    no gradient before the others (the temperature's) would have none.
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
    """This rank's slice of a whole tensor under ZeRO-3: equal slices, zeros behind the end."""
    size = parameter.ds_tensor.numel()
    flat = value.flatten()
    padded = F.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
    return padded[size * dist.get_rank() :][:size]
