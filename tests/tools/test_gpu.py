"""`make gpu` keeps to its time, kills what does not, and saves what it has after each part."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools import gpu
from tools.gpu import Part, run_parts


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]


@pytest.fixture
def short(monkeypatch):
    """Limits of seconds instead of minutes."""
    monkeypatch.setattr(gpu, "LEAST", 1.0)
    monkeypatch.setattr(gpu, "TO_KILL", 2.0)


def test_a_part_over_its_limit_is_killed_with_its_children_and_the_next_one_runs(tmp_path, short):
    child = tmp_path / "child"
    spawn = (
        "import subprocess, sys, time, pathlib\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(p.pid)); print('started', flush=True); time.sleep(60)"
    )
    chosen = [Part("slow", python(spawn), 0.3), Part("quick", python("print('done')"), 0.5)]
    start = time.monotonic()
    assert not run_parts(chosen, 20, tmp_path / "out")
    assert time.monotonic() - start < 15
    machine, slow, quick = lines(tmp_path / "out")
    assert {"gpu", "torch", "python"} <= machine.keys()
    assert (slow["part"], slow["status"]) == ("slow", "killed at its limit")
    assert slow["limit"] == pytest.approx(0.3 * 18, abs=0.5)
    assert (quick["part"], quick["status"]) == ("quick", 0)
    assert (tmp_path / "out" / "slow.log").read_text() == "started\n"
    assert (tmp_path / "out" / "quick.log").read_text() == "done\n"
    left = psutil.Process(int(child.read_text())) if psutil.pid_exists(int(child.read_text())) else None
    assert left is None or left.status() == psutil.STATUS_ZOMBIE


def test_without_time_a_part_is_not_started(tmp_path, short):
    now = iter([0.0, 0.0, 0.0, 5.0, 9.5])
    chosen = [Part("first", python("raise SystemExit(3)"), 0.5), Part("second", python(""), 0.5)]
    assert not run_parts(chosen, 10, tmp_path, clock=lambda: next(now))
    assert [line["status"] for line in lines(tmp_path)[1:]] == [3, "no time left"]


def test_every_part_names_what_exists(tmp_path, capsys):
    from umarvel_ray.cli import JOB_VERBS
    from umarvel_ray.recipe import load_recipe

    for part in gpu.parts(tmp_path):
        module = part.command[part.command.index("-m") + 1]
        if module == "umarvel_ray.cli":
            assert part.command[3] in JOB_VERBS
            recipe = load_recipe(part.command[4], part.command[5:])
            assert (recipe.cluster.gpus_per_worker, recipe.cluster.gpus_per_embedder) == (1, 1)
        elif module == "benchmarks.gpu":
            assert part.command[3] in ("2b", "7b")
