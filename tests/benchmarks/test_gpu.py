"""The GPU benchmark runs from end to end on a CPU, so that an hour on a GPU is not lost to a slip."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPO

SCRIPT = REPO / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_section_runs_and_all_ways_agree(tmp_path):
    out = tmp_path / "gpu.json"
    words = [sys.executable, str(SCRIPT), "--tiny", "--rounds", "1", "--out", str(out)]
    subprocess.run(words, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    figures = json.loads(out.read_text())
    assert max(figures["check"].values()) < 1e-5
    for section in ("embed", "train"):
        computed = {name: way["computed_tokens"] for name, way in figures[section]["ways"].items()}
        assert all((share == 1.0) == name.startswith("packed") for name, share in computed.items())
    for found in ("loss", "gradient_norm"):
        values = [way[found] for way in figures["train"]["ways"].values()]
        assert values == pytest.approx([values[0]] * 6, rel=1e-4)
        assert values[0] > 0
    assert len(figures["memory"]["configurations"]) == 12
    assert figures["large"]["pairs"] == 24
