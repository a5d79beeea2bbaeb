"""The paired bootstrap against full enumeration and the normal approximation."""

import itertools
import tracemalloc

import numpy as np
import pytest

from umarvel_ray.evaluate import bootstrap
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


@pytest.mark.parametrize("at_once", [1, 1000, 4096, 10**9])
def test_numbers_do_not_depend_on_how_many_are_drawn_at_once(at_once, monkeypatch):
    """Against the formula on all draws at once, to the last bit."""
    rng = np.random.default_rng(2)
    ours, theirs = ({task: rng.random(n) for task, n in (("a", 300), ("b", 7), ("c", 1))} for _ in range(2))
    draws, drawn = np.random.default_rng(9), np.zeros(500)
    for task in ours:
        difference = ours[task] - theirs[task]
        drawn += difference[draws.integers(0, len(difference), (500, len(difference)))].mean(axis=1)
    monkeypatch.setattr(bootstrap, "DRAWN", at_once)
    found = paired_interval(ours, theirs, resamples=500, seed=9)
    assert (found.low, found.high) == tuple(np.quantile(drawn / 3, [0.025, 0.975]))


def test_memory_does_not_grow_with_queries_times_resamples():
    """Drawn at once, these would take 2.4 GB."""
    ours = {"a": np.ones(30_000)}
    tracemalloc.start()
    paired_interval(ours, {"a": np.zeros(30_000)}, resamples=5000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * bootstrap.DRAWN
