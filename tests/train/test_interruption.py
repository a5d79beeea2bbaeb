"""The disk fills up under a running job: one clear last line and the right exit status. For Ctrl-C see test_resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.timeout(1200)  # start-up is minutes when the machine is busy
PHASES = ("stage1.text", "stage1.image_text", "stage1.instruction")


def start_stage1(base: Path, output: Path, *overrides: str) -> subprocess.Popen:
    """Stage 1 with the demo's data and a tiny base, in its own process group, as a shell would start it."""
    small = [f"{phase}.batch_size=8" for phase in PHASES]
    return subprocess.Popen(
        [
            Path(sys.executable).parent / "umarvel",
            "train-stage1",
            f"base={base}",
            f"output={output}",
            *small,
            *overrides,
        ],
        cwd=REPO,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 1 MB, if this user may mount one; stage 1 of the tiny base writes about 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_a_running_job_in_one_line(tiny_base, tmp_path, small_disk):
    steps = [f"{phase}.max_steps=1" for phase in PHASES]
    tables = f"data.cache={tmp_path / 'tables'}"
    process = start_stage1(tiny_base, small_disk / "run", *steps, tables, "cluster.max_failures=0")
    try:
        output, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert "No space left on device" in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("umarvel: ")
    assert "Traceback" not in output
    assert list((tmp_path / "tables").glob("text_pairs-*.arrow")), "the disk was full before the job ran"
    assert process.returncode == 2
