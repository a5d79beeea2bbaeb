"""`umarvel` with faults in its first phase: the loss is NaN once, and one rank runs out of memory once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

NAN_AT, MEMORY_AT = 3, 5


def train_worker(config: dict[str, Any]) -> None:
    """Replaces Ray Train's entry point; each worker leaves a file behind for every fault that has happened."""
    import torch.distributed as dist

    from umarvel_ray.train import loop

    real_step = loop.run_step

    def first_time(spec, fault: str) -> bool:
        mark = Path(spec.folder) / f"{fault}-{dist.get_rank()}"
        new = not mark.exists()
        mark.touch()
        return new

    def run_step(engine, spec, batch, *rest):
        first_phase, step = spec.name == "text", batch.plan.step
        if first_phase and step == MEMORY_AT and dist.get_rank() == 1 and first_time(spec, "memory"):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        loss, *others = real_step(engine, spec, batch, *rest)
        return float("nan") if first_phase and step == NAN_AT and first_time(spec, "nan") else loss, *others

    loop.run_step = run_step
    loop.train_worker(config)


if __name__ == "__main__":
    from umarvel_ray import cli
    from umarvel_ray.train import launch

    launch._train_worker = train_worker
    sys.exit(cli.main())
