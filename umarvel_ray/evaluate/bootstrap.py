"""Is a difference in recall more than chance? A paired bootstrap over queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

DRAWN = 1_000_000  # queries drawn at once


class Interval(NamedTuple):
    """A difference of average recalls and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether the interval contains zero: the difference may be chance."""
        return self.low <= 0.0 <= self.high


def paired_interval(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the difference of two average recalls, ours − theirs.

    1. In each task, take the difference of the two scores of every query.
    2. Resample the queries of each task with replacement; pairing keeps the same queries on both sides.
    3. Average over tasks, which count equally, as in the reported average.
    4. Take the quantiles of the resampled averages.

    Args:
        ours, theirs: by task, the score of each query (n,); the same queries in the same order on both sides.
    """
    rng = np.random.default_rng(seed)
    observed, drawn = [], np.zeros(resamples)
    for task in ours:
        difference = np.asarray(ours[task], dtype=float) - np.asarray(theirs[task], dtype=float)  # 1.
        observed.append(difference.mean())
        drawn += _resampled_means(difference, resamples, rng)  # 2.
    low, high = np.quantile(drawn / len(ours), [(1 - confidence) / 2, (1 + confidence) / 2])  # 3. and 4.
    return Interval(float(np.mean(observed)), float(low), float(high))


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means (resamples,) of values drawn with replacement, as many as there are. The order of draws is row by row."""
    n = len(values)
    at_once = max(1, DRAWN // n)
    counts = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    return np.concatenate([values[rng.integers(0, n, (count, n))].mean(axis=1) for count in counts])
