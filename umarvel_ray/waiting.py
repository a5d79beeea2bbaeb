"""What a job waits for while the cluster has no room for it: one line, said again and again, never silence.

A cluster may still grow. A local Ray does not, so there a job that is too large for it ends at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import ray

from umarvel_ray.errors import UserError

SAY_EVERY = 30.0  # seconds


def resources(cpus: float, gpus: float) -> dict[str, float]:
    """What each actor or worker needs, by Ray's names."""
    return {kind: number for kind, number in (("CPU", cpus), ("GPU", gpus)) if number}


def require_room(what: str, count: int, kind: str, needs: Mapping[str, float], setting: str) -> None:
    """Make sure that a local Ray is large enough. For the arguments see `say_waiting`.

    Raises:
        UserError: it is not.
    """
    if "RAY_ADDRESS" in os.environ:
        return
    total = ray.cluster_resources()
    if short := _too_few(count, needs, total):
        name = short[0]
        raise UserError(
            f"{what}: {count} {kind} need {count * needs[name]:g} {name}s, and Ray on this machine has "
            f"{total.get(name, 0):g}; lower {setting}, or what each of them gets"
        )


def say_waiting(what: str, count: int, kind: str, needs: Mapping[str, float], setting: str) -> None:
    """Print what a job waits for, what the cluster has, and whether that can never be enough.

    Args:
        what: the work, such as "embedding" or "stage1"; kind: "actors" or "workers".
        count: how many of them have not started; needs: see `resources`.
        setting: the recipe's key that lowers their number.
    """
    total, free = ray.cluster_resources(), ray.available_resources()
    each = ", ".join(f"{number:g} {name}" for name, number in needs.items())
    has = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}" for name in needs)
    line = f"{what}: waiting for {count} {kind} ({each} each); free in the cluster: {has}"
    if short := _too_few(count, needs, total):
        line += f"; it has too few {' and '.join(short)}s in all: add nodes, or lower {setting}"
    print(line, file=sys.stderr, flush=True)


def _too_few(count: int, needs: Mapping[str, float], total: Mapping[str, float]) -> list[str]:
    """The resources of which a whole cluster has less than `count` times what is needed."""
    return [name for name, number in needs.items() if count * number > total.get(name, 0)]
