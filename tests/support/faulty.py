"""`python -m tests.support.faulty` is `umarvel`, but in its first job the loss is once NaN and one rank once out of memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

NAN_AT, MEMORY_AT = 3, 5


def train_worker(config: dict[str, Any]) -> None:
    """In place of Ray Train's entry point; each worker leaves a file behind for what has gone wrong already."""
    import torch.distributed as dist

    from umarvel_ray.train import loop

    whole_step = loop.run_step

    def once(job, what: str) -> bool:
        mark = Path(job.folder) / f"{what}-{dist.get_rank()}"
        new = not mark.exists()
        mark.touch()
        return new

    def run_step(engine, job, batch, *rest):
        first_job, step = job.name == "text", batch.plan.step
        if first_job and step == MEMORY_AT and dist.get_rank() == 1 and once(job, "memory"):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        loss, *others = whole_step(engine, job, batch, *rest)
        return float("nan") if first_job and step == NAN_AT and once(job, "nan") else loss, *others

    loop.run_step = run_step
    loop.train_worker(config)


if __name__ == "__main__":
    from umarvel_ray import cli
    from umarvel_ray.train import launch

    launch._train_worker = train_worker
    sys.exit(cli.main())
