"""Timing: the sides of a comparison take turns, by wall clock and by CPU time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

CLOCKS = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
CPU = torch.device("cpu")

Times = dict[str, dict[str, list[float]]]  # side → clock → one value per round


def alternate(
    sides: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device = CPU, warm_up_rounds: int = 0
) -> Times:
    """Time every side once per round, each round starting with another side.

    The speed of a shared machine drifts, so ratios are only taken within a round.

    Args:
        warm_up_rounds: rounds before the counted ones.
    """
    times: Times = {name: {clock: [] for clock in CLOCKS} for name in sides}
    names = list(sides)
    for number in range(-warm_up_rounds, rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            elapsed = measure(sides[name], device)
            if number < 0:
                continue
            for clock, value in elapsed.items():
                times[name][clock].append(value)
            print(f"  round {number + 1}, {name}: {elapsed['seconds']:.2f} s", flush=True)
    return times


def measure(work: Callable[[], Any], device: torch.device = CPU) -> dict[str, float]:
    """Seconds of one call by each clock, including everything it queued on the device."""
    synchronize(device)
    begin = {clock: now() for clock, now in CLOCKS.items()}
    work()
    synchronize(device)
    return {clock: now() - begin[clock] for clock, now in CLOCKS.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """Median over rounds of other / ours."""
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))
