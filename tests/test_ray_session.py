"""A local Ray on a busy machine: started again, and one line if that does not help."""

from __future__ import annotations

import re
import socket

import pytest
import ray

from umarvel_ray.errors import UserError
from umarvel_ray.ray_session import STARTS, start_ray


@pytest.fixture
def slow_starts(monkeypatch):
    """Ray that is not up within its half minute a given number of times; counts the starts."""
    started = []

    def make(failures: int, message: str = "The current node timed out during startup.") -> list[str]:
        def init(**options) -> None:
            started.append(options["address"])
            if len(started) <= failures:
                raise RuntimeError(message)

        monkeypatch.setattr(ray, "init", init)
        return started

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return make


def test_a_slow_start_is_tried_again(slow_starts):
    started = slow_starts(STARTS - 1)
    with start_ray():
        pass
    assert started == ["local"] * STARTS


def test_a_machine_that_stays_too_busy_is_one_line(slow_starts):
    slow_starts(STARTS)
    with pytest.raises(UserError, match="this machine is too busy"), start_ray():
        pass


def test_another_error_is_not_hidden(slow_starts):
    started = slow_starts(STARTS, "no space left")
    with pytest.raises(RuntimeError, match="no space left"), start_ray():
        pass
    assert started == ["local"]


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "[::1]:{}", "nowhere.invalid:{}"])
def test_a_cluster_that_does_not_answer_is_one_line_at_once(monkeypatch, address):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(free.getsockname()[1])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=re.escape(f"no Ray cluster at RAY_ADDRESS={address} (")), start_ray():
        pytest.fail("connected")
