"""The paired bootstrap against full enumeration and the normal approximation."""

import itertools

import numpy as np
import pytest

from umarvel_ray.evaluate.bootstrap import paired_interval


def test_interval_equals_the_full_enumeration():
    """Two tasks of three and two queries have 27 × 4 resamples, all equally likely."""
    ours = {"a": np.array([1.0, 0.0, 1.0]), "b": np.array([1.0, 0.0])}
    theirs = {"a": np.array([0.0, 1.0, 0.0]), "b": np.array([0.0, 0.0])}
    a, b = ours["a"] - theirs["a"], ours["b"] - theirs["b"]
    means = [
        (a[list(i)].mean() + b[list(j)].mean()) / 2
        for i in itertools.product(range(3), repeat=3)
        for j in itertools.product(range(2), repeat=2)
    ]
    found = paired_interval(ours, theirs, confidence=0.7, resamples=200_000)
    assert found.mean == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.15, 0.85]), abs=1e-9)


def test_interval_of_many_queries_is_the_normal_one_and_pairing_narrows_it():
    rng = np.random.default_rng(5)
    theirs = {task: rng.random(n) for task, n in (("a", 300), ("b", 500))}
    ours = {task: values + rng.normal(0.01, 0.05, len(values)) for task, values in theirs.items()}
    found = paired_interval(ours, theirs)
    sd = np.sqrt(sum((ours[t] - theirs[t]).var() / len(theirs[t]) for t in theirs)) / 2
    assert [found.low, found.high] == pytest.approx([found.mean - 1.96 * sd, found.mean + 1.96 * sd], abs=0.1 * sd)
    assert paired_interval(theirs, theirs) == (0, 0, 0)
