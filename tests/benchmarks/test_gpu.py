"""The GPU benchmark runs end to end on a CPU, so that GPU time is not lost to a typo."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPO


@pytest.mark.slow
def test_every_section_runs_and_all_sides_agree(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--rounds", "1", "--out", str(out)]
    subprocess.run(command, check=True, cwd=REPO, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    figures = json.loads(out.read_text())
    assert max(figures["check"].values()) < 1e-5
    for section in ("embed", "train"):
        computed = {name: side["computed_tokens"] for name, side in figures[section]["sides"].items()}
        assert all((share == 1.0) == name.startswith("packed") for name, share in computed.items())
    for output in ("loss", "gradient_norm"):
        values = [side[output] for side in figures["train"]["sides"].values()]
        assert values == pytest.approx([values[0]] * 6, rel=1e-4)
        assert values[0] > 0
    assert len(figures["memory"]["configurations"]) == 12
    assert figures["large"]["pairs"] == 24
