"""The paper's ablations: a row changes only what its table ablates, and a killed table resumes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from experiments.ablation.record import count_verdicts, make_record, markdown, verdict
from experiments.ablation.tables import NUMBERS, Row, Table, paper_table
from experiments.ablation.trials import Outcome, hits_of
from tests.conftest import REPO
from tests.support.mini_data import make_mini_data
from tests.support.random_result import random_result
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.recipe import SHIPPED, load_recipe
from umarvel_ray.runs import LADDER

RECIPES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
VARIES = {  # what a row of each table may change
    1: ("model.", "stage1.image_text"),
    2: ("model.instruction_mask", "stage1.image_text"),
    3: ("stage1.text", "stage1.image_text"),
    4: ("stage1.instruction.",),
    5: ("stage2.",),
    6: ("stage3.train",),
}


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("number", NUMBERS)
def test_a_row_changes_only_what_its_table_ablates(number, name):
    recipe = load_recipe(name)
    table, base = paper_table(number, recipe), flat(recipe.model_dump())
    assert table.reference in [row.label for row in table.rows]
    variants = []
    for row in table.rows:
        if row.changes is None:
            continue
        variant = flat(load_recipe(name, list(row.changes)).model_dump())
        changed = {key for key in {**base, **variant} if base.get(key) != variant.get(key)}
        assert all(key.startswith(VARIES[number]) for key in changed)
        variants.append(variant)
    assert all(a != b for a, b in itertools.combinations(variants, 2)), "two rows are the same"


def test_rows_of_table_4_see_equally_many_queries():
    recipe = load_recipe("demo")
    for row in paper_table(4, recipe).rows:
        phase = load_recipe("demo", list(row.changes)).stage1.instruction
        seen = recipe.stage1.instruction.batch_size * recipe.stage1.instruction.max_steps
        assert 0 <= seen - phase.batch_size * phase.max_steps < phase.batch_size
    phases = [load_recipe("qwen2vl-7b", list(row.changes)).stage1.instruction for row in
             paper_table(4, load_recipe("qwen2vl-7b")).rows]  # fmt: skip
    assert [phase.batch_size for phase in phases] == [480, 1920, 3840, 3840, 3840, 7680]
    assert [phase.peak_rate for phase in phases] == pytest.approx([1e-4, 1e-4, 2.83e-4, 4e-4, 4e-4, 4e-4], rel=1e-3)


def test_hits_are_the_reports_recall(tmp_path):
    recipe = load_recipe("demo")
    dataset = open_dataset(recipe.data)
    result = random_result(dataset, recipe, "text", 0.4, tmp_path)
    hits = hits_of(result, dataset, recipe.evaluate)
    for scope, recalls in (("local", result.local), ("global", result.global_)):
        assert {task: values.mean() for task, values in hits[scope].items()} == pytest.approx(
            {task: recall for task, recall in recalls.items() if task != "average"}
        )


def outcome(*hits: float) -> Outcome:
    array = {"t": np.array(hits)}
    return Outcome({"local": np.mean(hits), "global": np.mean(hits)}, {"local": array, "global": array})


def test_record_and_table_by_hand():
    rows = (
        Row("reference", ("seed=1",), (50.0, 40.0)),
        Row("better", ("seed=2",), (60.0, None), "higher"),
        Row("worse", ("seed=3",), (40.0, 30.0), "higher"),
        Row("close", ("seed=4",), claim="lower"),
        Row("lost", ("seed=5",), ("failed", "failed"), "lower"),
        Row("untried", ("seed=6",), claim="lower"),
    )
    table = Table(5, "stage2", LADDER[-2], LADDER[:3], "reference", rows)
    half = [0.0, 1.0] * 20
    outcomes = {
        "reference": {42: outcome(*half), 43: outcome(*half)},
        "better": {42: outcome(*[1.0] * 40)},
        "worse": {42: outcome(*[0.0] * 40)},
        "close": {42: outcome(*half[:-2], 1.0, 0.0), 43: outcome(*half[:-2], 0.0, 0.0)},
        "lost": {42: Outcome({}, {}, "lost: loss is nan at step 3")},
    }
    facts = {"recipe": "demo", "row_changes": ["a.b=1"], "seed": 42, "shared_seed": 1, "queries": 40}
    record = make_record(table, outcomes, facts)
    found = {row["label"]: row for row in record["rows"]}
    assert [verdict(found[row.label]) for row in rows] == [
        "", "agrees", "disagrees", "inconclusive", "agrees", "not run",
    ]  # fmt: skip
    assert count_verdicts([record]) == {"agrees": 2, "disagrees": 1, "inconclusive": 1, "not run": 1}
    assert found["reference"]["difference"] is None
    assert found["better"]["difference"]["local"].mean == pytest.approx(0.5)
    assert found["close"]["difference"]["local"].mean == pytest.approx((0.0 - 1 / 40) / 2)
    text = markdown(json.loads(json.dumps(record)))
    assert not record["complete"]
    assert record["row_changes"] == ["a.b=1"]
    assert [record[key] for key in ("seed", "shared_seed", "queries")] == [42, 1, 40]
    assert "| better | 60.0 | – | 100.0 | 100.0 | +50.0 [" in text
    assert "| close | – | – | 48.8 ± 1.8 |" in text
    assert "| lost | failed | failed | failed | failed |" in text
    assert make_record(table, {row.label: outcomes["better"] for row in rows}, facts)["complete"]


def start(base: Path, data: Path, output: Path) -> subprocess.Popen:
    small = ["stage1.text.max_steps=2", "stage1.instruction.max_steps=3", "stage1.instruction.homogeneous=0"]
    small += [f"stage1.{name}.batch_size=8" for name in ("text", "instruction")]
    command = [
        sys.executable,
        "-m",
        "experiments.ablate",
        "demo",
        f"base={base}",
        f"data.root={data}",
        f"output={output}",
    ]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen([*command, *small, "--table", "2"], cwd=REPO, env=env, start_new_session=True)


def losses(output: Path) -> dict[str, list[float]]:
    logs = sorted(output.glob("ablations/table-2/*/train/*/log.jsonl"))
    return {
        f"{log.parts[-4]}/{log.parts[-2]}": [json.loads(line)["loss"] for line in log.read_text().splitlines()]
        for log in logs
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_table_resumes_row_by_row(tiny_base, tmp_path):
    data = make_mini_data(tmp_path / "mini")
    assert start(tiny_base, data, tmp_path / "whole").wait() == 0
    process = start(tiny_base, data, tmp_path / "cut")
    first = tmp_path / "cut/ablations/table-2/instruction-pooled-seed-42/checkpoints/instruction/model.safetensors"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    psutil.wait_procs(family, timeout=90)
    made = first.stat().st_mtime_ns
    assert start(tiny_base, data, tmp_path / "cut").wait() == 0
    assert first.stat().st_mtime_ns == made, "a finished row was trained again"
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4
    whole, cut = (json.loads((tmp_path / name / "ablations" / "table-2.json").read_text()) for name in ("whole", "cut"))
    assert whole == cut
    assert whole["complete"]
    assert all(row["seeds"]["42"]["local"] > 0 for row in whole["rows"])
