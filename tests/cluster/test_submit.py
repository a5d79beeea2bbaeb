"""The `ray job submit` commands of docs/submit.md, against a token-authenticated cluster on loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
HEAD, SUBMIT = re.findall(r"```sh\n(source .*?)```", (REPO / "docs" / "submit.md").read_text(), re.DOTALL)
BIN = Path(sys.executable).parent
PHASES = ("stage1.text", "stage1.image_text", "stage1.instruction")


def shell(lines: str) -> list[str]:
    """A bash command for the documented lines, with this environment instead of .venv and other ports."""
    lines = lines.replace(".venv/bin/activate", str(BIN / "activate")).replace("26379", "27379")
    return ["bash", "-ec", lines.replace("28265", "29265").replace("28266", "29266")]


@pytest.fixture(scope="module")
def head():
    with tempfile.TemporaryDirectory(prefix="umh", dir="/tmp") as folder:
        start = shell(HEAD.replace("/tmp/um-head", folder))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        process = subprocess.Popen(start, cwd=REPO, env=environment, start_new_session=True)
        yield process
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def submit(entry: str) -> subprocess.CompletedProcess:
    """Submit a job with the documented options; retries while the cluster is still starting."""
    setup, _, line = SUBMIT.partition("ray job submit")
    command = shell(f"{setup}ray job submit{line.split(' -- ')[0]} -- {entry}")
    for _ in range(20):
        process = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        if "Failed to connect" not in process.stderr and "No available agent" not in process.stderr:
            break
        time.sleep(5)
    return process


def test_a_submitted_job_runs_from_the_uploaded_folder(head):
    process = submit("python jobs/stage3.py --recipe demo seed=11 --dry-run")
    assert process.returncode == 0, process.stderr
    assert re.search(r"^seed: 11$", process.stdout, re.MULTILINE)


def test_a_user_error_is_one_line_in_the_job_log(head):
    process = submit("python jobs/stage3.py --recipe demo stage3.topk=3")
    assert process.returncode != 0
    assert "umarvel: recipe demo: unknown key 'stage3.topk'" in process.stdout + process.stderr
    assert "exit code 2" in process.stdout + process.stderr


def test_a_submitted_stage_trains_on_the_cluster(head, tiny_base, tmp_path):
    small = " ".join(f"{phase}.batch_size=8 {phase}.max_steps=1" for phase in PHASES)
    process = submit(f"python jobs/stage1.py --recipe demo base={tiny_base} output={tmp_path}/run {small}")
    assert process.returncode == 0, process.stdout
    provenance = (tmp_path / "run" / "checkpoints" / "instruction" / "umarvel.json").read_text()
    assert yaml.safe_load(provenance)["phase"] == "instruction"
