"""The memory that DeepSpeed uses per ZeRO stage, from the storages of all live tensors; for tests/estimate."""

from __future__ import annotations

import gc

import torch

from tests.support.exactness import STEP, batches, tempered
from umarvel_ray.model.batch import collate
from umarvel_ray.recipe import Compute, Lora
from umarvel_ray.train.engine import make_engine
from umarvel_ray.train.frozen_tower import FrozenTower

CASES = ((0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"))


def weigh(rank: int, world: int, base: str, out: str) -> None:
    """After a backward pass of each case: counts of trainable, frozen and tower parameters, and all storages' bytes."""
    items = [item for item in batches(base, False)[0][1] if not item.pictures]
    found = {}
    for zero, dtype in CASES:
        gc.collect()
        gc.freeze()  # what exists already does not count and is not scanned again
        module = tempered(base, dtype, Lora(r=64, alpha=8, dropout=0.0)).train()
        tower = FrozenTower(module.embedder.backbone, module.embedder.scale)
        sizes = [(p.requires_grad, p.numel()) for p in module.parameters()]
        engine = make_engine(module, STEP, Compute(zero_stage=zero, dtype=dtype))
        vectors, tau = engine(collate(items), {})
        engine.backward(vectors.sum() + tau.sum())
        del vectors, tau
        counts = [sum(n for trains, n in sizes if trains == trainable) for trainable in (True, False)]
        found[zero, dtype] = [*counts, sum(p.numel() for p in tower._visual.parameters()), _storages()]
        engine.destroy()
        del engine, module, tower
    if rank == 0:
        torch.save(found, out)


def _storages() -> list[int]:
    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    tensors += [value.grad for value in tensors if value.is_leaf and value.grad is not None]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    return list(storages.values())
