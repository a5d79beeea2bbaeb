"""`umarvel status`: what the files of a run say, whoever wrote them, and whether a job is at work."""

from __future__ import annotations

import json

import numpy as np
import pytest

from umarvel_ray.cli import main
from umarvel_ray.data.plan import PlanStep, write_plan
from umarvel_ray.errors import UserError
from umarvel_ray.recipe import load_recipe
from umarvel_ray.runs import Run
from umarvel_ray.status import as_text, read_status


@pytest.fixture
def run(tmp_path) -> Run:
    """Text is done, image-text is at step 30 of 40 after one failure, the rest has not begun."""
    run = Run.open(load_recipe("demo", [f"output={tmp_path / 'run'}"]))
    done = run.dir / "checkpoints" / "text"
    done.mkdir(parents=True)
    (done / "config.json").write_text("{}")
    for phase, steps, taken in (("text", 22, 22), ("image-text", 40, 30)):
        folder = run.dir / "train" / phase
        folder.mkdir(parents=True)
        write_plan([step(number) for number in range(steps)], folder / "plan.parquet", "identity")
        lines = [
            {"step": n, "loss": 5.0 - n / 10, "seconds": 2.0 if n >= 10 else 100.0, "wait_share": 0.25,
             "samples_per_s": 64.0} for n in range(taken)
        ]  # fmt: skip
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    failure = {"kind": "other", "step": 7, "error": "rank 1: Connection reset"}
    (folder / "failures.jsonl").write_text(json.dumps(failure) + "\n")
    (folder / "in-training.jsonl").write_text(json.dumps({"step": 19, "recall": 0.4375, "tasks": {}}) + "\n")
    (run.dir / "times.json").write_text(json.dumps({"stage1": 125.0}))
    return run


def step(number: int) -> PlanStep:
    one = np.array([0])
    return PlanStep(number, one, one, {"answers": one})


def test_phases_have_the_numbers_of_their_files(run):
    status = read_status(run.dir)
    assert [(phase.name, phase.state) for phase in status.phases] == [
        ("text", "done"), ("image-text", "stopped"), ("instruction", "not started"), ("hard-negatives", "not started"),
        ("reranker", "not started"), ("distillation", "not started"),
    ]  # fmt: skip
    current = status.phases[1]
    assert (current.step, current.steps, current.recall, current.failures) == (30, 40, 0.4375, 1)
    assert (current.samples_per_s, current.waiting, current.left_s) == (64.0, 0.25, 20.0)
    assert current.last_failure == "rank 1: Connection reset"
    assert current.loss == pytest.approx(2.1)
    assert status.phases[0].left_s is None
    assert status.times == {"stage1": 125.0}


def test_a_job_at_work_is_seen_by_its_lock(run):
    assert not read_status(run.dir).running
    with run.held():
        status = read_status(run.dir)
        assert (status.running, status.phases[1].state) == (True, "running")
    assert not read_status(run.dir).running


def test_a_line_that_is_being_written_does_not_count(run):
    log = run.dir / "train" / "image-text" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 30, "lo')
    assert read_status(run.dir).phases[1].step == 30


def test_unfinished_outputs_are_counted(run):
    folder = run.dir / "mined" / "instruction"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"inputs": {}, "shards": 8, "complete": False}))
    for number in range(3):
        (folder / f"shard-{number:05d}.parquet").touch()
    [output] = read_status(run.dir).outputs
    assert output == ("mined/instruction", 3, 8)
    assert "mined/instruction: 3 of 8 shards" in as_text(read_status(run.dir))


def test_the_command_prints_a_table_or_json(run, capsys):
    assert main(["status", str(run.dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{run.dir}: no job is working in it; last step ")
    assert " ".join(lines[3].split()) == "image-text stopped 30 of 40 2.1000 64.0 25% 20 s 0.438 1"
    assert "image-text: last failure: rank 1: Connection reset" in lines
    assert lines[-1] == "2 min 05 s so far: stage1 2 min 05 s"
    assert main(["status", str(run.dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["phases"][1]["left_s"] == 20.0


def test_another_folder_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(UserError, match="is not a run folder"):
        read_status(tmp_path)
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
