"""Is a difference in recall more than chance? A paired bootstrap over the queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A difference and where it lies with the asked confidence."""

    mean: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def paired_interval(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the difference of two average recalls, ours − theirs.

    Queries are drawn with replacement within each task, the same ones for both sides; as in the reported average every
    task counts the same.

    Args:
        ours, theirs: by task, (n,) what each query scored; the same queries in the same order on both sides.
    """
    rng = np.random.default_rng(seed)
    observed, drawn = [], np.zeros(resamples)
    for task in ours:
        difference = np.asarray(ours[task], dtype=float) - np.asarray(theirs[task], dtype=float)
        observed.append(difference.mean())
        drawn += difference[rng.integers(0, len(difference), (resamples, len(difference)))].mean(axis=1)
    low, high = np.quantile(drawn / len(ours), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.mean(observed)), float(low), float(high))
