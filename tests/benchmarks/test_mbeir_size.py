"""Every step around the model on a small share of M-BEIR's size: it runs, loses nothing, and its memory is bounded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.common.mbeir_folder import write_mbeir_folder
from benchmarks.mbeir_size import RANKED_SHARDS, STEPS
from umarvel_ray.inference.embed import rows_per_shard

SCALE = 0.01
GROWTH_GIB = 0.25  # what a step may allocate; at this scale the texts alone are 24 MB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("size")


@pytest.fixture(scope="module")
def figures(folder):
    out = folder / "out.json"
    command = [sys.executable, "-m", "benchmarks.mbeir_size", str(folder), "--scale", str(SCALE), "--out", str(out)]
    subprocess.run(command, check=True, timeout=1200)
    return json.loads(out.read_text())["steps"]


def test_every_step_sees_every_row(folder, figures):
    counts = write_mbeir_folder(folder / f"data-{SCALE:g}", SCALE)
    load, filters = figures["load"], figures["filters"]
    assert list(figures) == list(STEPS)
    assert load["train queries"] == counts.train_queries
    assert load["test queries"] == figures["evaluate"]["queries"] == counts.test_queries
    assert counts.documents <= load["documents"] <= counts.documents + counts.training_documents
    assert filters["candidates"] == 100 * counts.train_queries
    assert figures["rank"]["queries"] == RANKED_SHARDS * rows_per_shard(counts.train_queries)
    assert figures["plan"]["steps"] == counts.train_queries // 38


def test_no_step_needs_more_memory_than_its_share(figures):
    growth = {step: own["peak_gib"] - own["start_gib"] for step, own in figures.items()}
    assert max(growth.values()) < GROWTH_GIB, growth
    assert figures["rank"]["actor_gib"] < 1 + figures["rank"]["slice_gib"]
