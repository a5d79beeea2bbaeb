"""Rule 5 through Ray Train: SIGKILL a worker, or the driver, at a random step; every logged loss stays the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPO
from tests.mini_data import make_mini_data

pytestmark = pytest.mark.timeout(1500)
STEPS = {"text": 10, "image_text": 6, "instruction": 6}


@pytest.fixture(scope="module")
def command(tiny_base, tmp_path_factory):
    data = make_mini_data(tmp_path_factory.mktemp("mini"))
    small = [f"stage1.{name}.max_steps={n}" for name, n in STEPS.items()]
    small += [f"stage1.{name}.batch_size=8" for name in STEPS]
    small += [f"stage1.{name}.checkpoint_every=2" for name in STEPS]
    small += ["stage1.instruction.homogeneous=0", "stage1.text.lora.dropout=0.1"]
    return [Path(sys.executable).parent / "umarvel", "stage1", f"base={tiny_base}", f"data.root={data}", *small]


def start(command: list, output: Path) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen([*command, f"output={output}"], cwd=REPO, env=env, start_new_session=True)


def losses(output: Path) -> dict[str, list[tuple[int, float, float]]]:
    logs = {path.parent.name: path.read_text().splitlines() for path in sorted(output.glob("train/*/log.jsonl"))}
    return {
        name: [(row["step"], row["loss"], row["temperature"]) for row in map(json.loads, lines)]
        for name, lines in logs.items()
    }


def wait_for_step(output: Path, step: int, process: subprocess.Popen) -> None:
    log = output / "train" / "text" / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") <= step:
        assert process.poll() is None
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert start(command, output).wait() == 0
    found = losses(output)
    assert [len(found[name]) for name in ("text", "image-text", "instruction")] == list(STEPS.values())
    return found


def test_a_killed_worker_changes_no_loss(command, undisturbed, tmp_path):
    process = start(command, tmp_path)
    wait_for_step(tmp_path, random.randrange(2, 8), process)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in p.name()]
    assert len(workers) == 2
    random.choice(workers).send_signal(signal.SIGKILL)
    assert process.wait() == 0
    assert losses(tmp_path) == undisturbed


def test_a_killed_driver_changes_no_loss(command, undisturbed, tmp_path):
    process = start(command, tmp_path)
    wait_for_step(tmp_path, random.randrange(2, 8), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(family, timeout=90)
    assert not left, "a local Ray must not outlive its driver"
    assert start(command, tmp_path).wait() == 0
    assert losses(tmp_path) == undisturbed


def test_a_loss_that_is_not_a_number_ends_the_run_in_one_line(command, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    changes = ["stage1.text.learning_rate=1.0e+30", f"output={tmp_path}"]
    ended = subprocess.run([*command, *changes], cwd=REPO, env=env, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("umarvel: text: loss is nan at step")
    assert "Traceback" not in ended.stderr
