"""A learned τ stops at its bounds and can leave them again, under every ZeRO stage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.support.exactness import BOUNDS, STEP, batches, spawn, tempered
from umarvel_ray.errors import UserError
from umarvel_ray.model.batch import collate
from umarvel_ray.recipe import Compute, load_recipe
from umarvel_ray.train.engine import capture, keep_temperature, make_engine, start_step, take_step

STAGES = (0, 1, 2, 3)
NAME = "param.embedder.log_temperature"
COLDER, WARMER = 40, 25  # steps; Adam turns round after seven


def cool_and_warm(rank: int, world: int, base: Path, out: str) -> None:
    """By ZeRO stage: log τ after steps that want it colder than its bound, and after some that want it warmer."""
    items = [item for item in batches(base, False)[0][1] if not item.pictures][:2]
    found = {}
    for stage in STAGES:
        engine = make_engine(tempered(base).train(), STEP, Compute(zero_stage=stage, dtype="float32"))
        values = []
        for step in range(COLDER + WARMER):
            start_step(engine, 0.1)
            vectors, log_temperature = engine(collate(items), {})
            sign = 1 if step < COLDER else -1
            engine.backward(0 * vectors.sum() + sign * log_temperature.sum())
            take_step(engine)
            keep_temperature(engine, BOUNDS)
            values.append(log_temperature.item())
        found[stage] = (min(values), values[-1], capture(engine).get(NAME))
        engine.destroy()
    if rank == 0:
        torch.save(found, out)


@pytest.fixture(scope="module")
def found(tiny_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("temperature") / "found.pt"
    spawn(2, cool_and_warm, tiny_base, str(out))
    return torch.load(out)


@pytest.mark.parametrize("stage", STAGES)
def test_it_stops_at_its_bound_and_leaves_it(found, stage):
    lowest, last, stored = found[stage]
    assert lowest == pytest.approx(BOUNDS[0], abs=1e-6)
    assert last > BOUNDS[0] + 0.02
    assert BOUNDS[0] < stored.item() < BOUNDS[1]


def test_a_start_outside_the_bounds_is_refused():
    key = "stage1.instruction.temperature"
    with pytest.raises(UserError, match=rf"{key}: .*init 0.005 of a learned temperature is outside 0.01 to 1.0"):
        load_recipe("demo", [f"{key}={{init: 0.005, learn: true}}"])
    assert load_recipe("demo", [f"{key}={{init: 0.005}}"]).stage1.instruction.temperature.init == 0.005
    assert math.exp(BOUNDS[0]) == pytest.approx(0.01)
