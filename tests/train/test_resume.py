"""A resumed run through Ray Train: a worker killed, Ctrl-C, the driver killed; every logged loss stays the same.

Starting takes longer than training here, so one run goes through all three, each at a random step.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.conftest import REPO
from tests.support import faulty
from tests.support.mini_data import make_mini_data

pytestmark = pytest.mark.timeout(1500)
STEPS = {"text": 10, "image_text": 6, "instruction": 6}


@pytest.fixture(scope="module")
def command(tiny_base, tmp_path_factory):
    data = make_mini_data(tmp_path_factory.mktemp("mini"))
    small = [f"stage1.{name}.max_steps={n}" for name, n in STEPS.items()]
    small += [f"stage1.{name}.batch_size=8" for name in STEPS]
    small += [f"stage1.{name}.checkpoint_every=2" for name in STEPS]
    small += ["stage1.instruction.homogeneous=0", "stage1.text.lora.dropout=0.1"]
    return [Path(sys.executable).parent / "umarvel", "train-stage1", f"base={tiny_base}", f"data.root={data}", *small]


def start(command: list, output: Path, **more) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen([*command, f"output={output}"], cwd=REPO, env=env, start_new_session=True, **more)


def losses(output: Path) -> dict[str, list[tuple[int, float, float]]]:
    logs = {path.parent.name: path.read_text().splitlines() for path in sorted(output.glob("train/*/log.jsonl"))}
    return {
        name: [(row["step"], row["loss"], row["temperature"]) for row in map(json.loads, lines)]
        for name, lines in logs.items()
    }


def wait_for_step(output: Path, phase: str, step: int, process: subprocess.Popen) -> None:
    log = output / "train" / phase / "log.jsonl"
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


@pytest.fixture(scope="module")
def disturbed(command, tmp_path_factory):
    """The run with a worker killed in the first phase, Ctrl-C in the second and the driver killed in the third."""
    output = tmp_path_factory.mktemp("disturbed")
    with (output / "output.txt").open("w") as file:
        process = start(command, output, stdout=file, stderr=subprocess.STDOUT)
        wait_for_step(output, "text", random.randrange(2, 8), process)
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in p.name()]
        assert len(workers) == 2
        random.choice(workers).send_signal(signal.SIGKILL)
        wait_for_step(output, "image-text", random.randrange(1, 4), process)
        families = [psutil.Process(process.pid).children(recursive=True)]
        os.killpg(process.pid, signal.SIGINT)  # to the whole foreground process group, as a terminal does
        status = process.wait()
    _, left = psutil.wait_procs(families[0], timeout=60)
    assert not left
    process = start(command, output)
    wait_for_step(output, "instruction", random.randrange(1, 4), process)
    families.append(psutil.Process(process.pid).children(recursive=True))
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(families[1], timeout=90)
    assert not left, "a local Ray must not outlive its driver"
    assert start(command, output).wait() == 0
    return output, status


def test_neither_a_killed_worker_nor_an_interruption_nor_a_killed_driver_changes_a_loss(undisturbed, disturbed):
    output, _ = disturbed
    assert losses(output) == undisturbed


def test_a_killed_worker_is_logged_with_its_step_and_items(disturbed):
    output, _ = disturbed
    [failure] = map(json.loads, (output / "train" / "text" / "failures.jsonl").read_text().splitlines())
    assert failure["step"] >= 2
    assert len(failure["query_ids"]) == 8
    assert [path.parent.name for path in output.glob("train/*/failures.jsonl")] == ["text"]


def test_ctrl_c_ends_a_running_job_in_one_line(disturbed):
    output, status = disturbed
    printed = (output / "output.txt").read_text()
    own = [line for line in printed.splitlines() if "(raylet)" not in line]  # which may be late about the killed worker
    assert own[-1].startswith("umarvel: interrupted")
    assert "Traceback" not in printed
    assert status == 130


@pytest.mark.slow
def test_steps_that_fail_once_are_retried_and_change_no_loss(command, undisturbed, tmp_path):
    assert start([sys.executable, "-m", "tests.support.faulty", *command[1:]], tmp_path).wait() == 0
    assert losses(tmp_path) == undisturbed
    first, second = map(json.loads, (tmp_path / "train" / "text" / "failures.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (faulty.NAN_AT, faulty.MEMORY_AT)
    assert (first["kind"], second["kind"]) == ("not finite", "out of memory")
    assert first["error"].startswith("text: loss is nan at step 3 (queries ")
    assert second["error"].startswith("text: rank 1 is out of memory at step 5, with up to ")
    assert first["query_ids"] != second["query_ids"]


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_workers(command, tmp_path):
    """Through Ray Train: two workers, then one after a resume, give what two workers give throughout."""
    exact = [*command, "stage1.text.lora.dropout=0.0"]  # dropout masks are drawn per rank
    assert start(exact, tmp_path / "whole").wait() == 0
    process = start(exact, tmp_path / "moved")
    wait_for_step(tmp_path / "moved", "text", random.randrange(3, 8), process)
    process.kill()
    process.wait()
    assert start([*exact, "cluster.workers=1"], tmp_path / "moved").wait() == 0
    found, expected = losses(tmp_path / "moved"), losses(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected[name]), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_non_finite_loss_ends_the_run_in_one_line(command, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    changes = ["stage1.text.learning_rate=1.0e+30", "cluster.max_failures=0", f"output={tmp_path}"]
    ended = subprocess.run([*command, *changes], cwd=REPO, env=env, capture_output=True, text=True)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert re.match(
        r"umarvel: text: (loss|gradient norm) is (nan|inf) at step \d+ \(queries .*lower learning_rate", last
    )
    assert "cluster.max_failures is used up" in last
    assert "Traceback" not in ended.stderr
    failures = [json.loads(line) for line in (tmp_path / "train" / "text" / "failures.jsonl").read_text().splitlines()]
    assert [failure["kind"] for failure in failures] == ["not finite"]
    assert len(failures[0]["query_ids"]) == 8
