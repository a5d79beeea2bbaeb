"""The whole pipeline on a cluster with exactly the GPUs that its recipe asks for: one, for everything."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import REPO
from tests.support.mini_data import make_mini_data

PHASES = (
    "stage1.text", "stage1.image_text", "stage1.instruction", "stage2.train", "reranker.train", "stage3.train",
)  # fmt: skip
ONE_GPU = ("cluster.workers=1", "cluster.gpus_per_worker=1", "cluster.embedders=1", "cluster.gpus_per_embedder=1")
SMALL = ("stage1.instruction.homogeneous=0", "stage2.mining.depth=8", "stage2.train.hard_negatives=2", "stage3.top_k=4",
         "stage3.sample=0.5", "evaluate.rerank_top=3", "evaluate.calibrate_on=4", "evaluate.k_of={}")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_embedding_reranking_and_training_share_one_gpu(tiny_base, tmp_path):
    data = make_mini_data(tmp_path / "data")
    changes = [f"{phase}.{key}" for phase in PHASES for key in ("max_steps=2", "batch_size=4")]
    command = [sys.executable, "-m", "tests.support.logical_gpus", "1", "demo", *ONE_GPU, *SMALL, *changes]
    command += [f"base={tiny_base}", f"data.root={data}", f"output={tmp_path / 'run'}"]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1700, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert (tmp_path / "run" / "report" / "metrics.json").exists()
    assert "has too few" not in ended.stderr
