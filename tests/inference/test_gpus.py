"""One owner of the GPUs at a time: every shipped recipe's placement fits a cluster of exactly the GPUs it asks for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPO
from tests.support.placement import clusters
from umarvel_ray.inference.gpus import Gpus
from umarvel_ray.recipe import SHIPPED


class Owner:
    def __init__(self) -> None:
        self.stopped = 0

    def stop(self) -> None:
        self.stopped += 1


def test_a_claim_stops_the_owner_before_it_and_no_other():
    gpus, first, second = Gpus(), Owner(), Owner()
    gpus.claim(first)
    gpus.claim(first)
    assert first.stopped == 0
    gpus.claim(second)
    assert (first.stopped, second.stopped) == (1, 0)
    gpus.free()
    gpus.free()
    assert (first.stopped, second.stopped) == (1, 1)
    gpus.claim(first)
    assert (first.stopped, second.stopped) == (1, 1)


@pytest.fixture(scope="module")
def placed():
    """What the placement script printed, and what it said on stderr; a Ray of its own, with logical GPUs."""
    command = [sys.executable, "-m", "tests.support.placement"]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), ended.stderr


def test_every_shipped_recipe_is_placed(placed):
    finished, _ = placed
    assert {path.stem for path in SHIPPED.glob("*.yaml")} == {name for names in clusters().values() for name in names}
    assert finished["placed"] == sorted(name for names in clusters().values() for name in names)


def test_actors_on_cpus_stay_alive(placed):
    finished, _ = placed
    assert finished["kept on cpus"] is True


def test_what_waits_says_what_for(placed):
    finished, said = placed
    assert finished["training waits"] is True
    assert "embedding: waiting for 1 actors (1 CPU, 1 GPU each); free in the cluster: " in said
    assert "of 0 GPU; it has too few GPUs in all: add nodes, or lower cluster.embedders" in said
