"""The real command line in a process of its own: what it prints, where, and the status it ends with."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import yaml

from tests.conftest import REPO
from umarvel_ray.cli import guard
from umarvel_ray.recipe import load_recipe
from umarvel_ray.runs import Run

UMARVEL = Path(sys.executable).parent / "umarvel"
JOBS = ("stage1", "stage2", "reranker", "stage3", "mine", "embed", "evaluate", "pipeline")


def run(*command, env: dict[str, str] | None = None, cwd: Path = REPO, timeout: float = 120, **more):
    environment = os.environ | (env or {})
    command = [str(part) for part in command]
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False, **more
    )


def assert_one_line(process: subprocess.CompletedProcess, status: int, *said: str) -> None:
    """The whole of stderr is one line that says all of `said`."""
    lines = process.stderr.splitlines()
    assert len(lines) == 1, process.stderr
    assert process.returncode == status
    for word in said:
        assert word in lines[0]


def test_help_is_quick_and_names_the_verbs():
    process = run(UMARVEL, "--help", timeout=20)
    assert process.returncode == 0
    for verb in (
        "demo",
        "train",
        "mine",
        "rerank",
        "distill",
        "embed",
        "index",
        "search",
        "evaluate",
        "export",
        "serve",
    ):
        assert f"    {verb} " in process.stdout


def test_light_commands_load_neither_torch_nor_ray():
    code = (
        "import sys; from umarvel_ray.cli import main; assert main(['demo', '--dry-run']) == 0; "
        "assert not {'torch', 'ray', 'transformers'} & sys.modules.keys()"
    )
    assert run(sys.executable, "-c", code).returncode == 0


def test_a_dry_run_prints_the_resolved_recipe_and_makes_nothing(tmp_path):
    process = run(UMARVEL, "demo", "seed=7", f"output={tmp_path}/run", "--dry-run")
    assert process.returncode == 0
    tree = yaml.safe_load(process.stdout)
    assert (tree["name"], tree["seed"], tree["stage3"]["alpha"]) == ("demo", 7, 0.5)
    assert re.search(r"^# stage2 ", process.stdout, re.MULTILINE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("job", JOBS)
def test_each_job_is_a_plain_script(job, monkeypatch, capsys):
    """In this process, to save eight starts of Python; a job in one of its own follows below."""
    script = str(REPO / "jobs" / f"{job}.py")
    monkeypatch.setattr(sys, "argv", [script, "--recipe", "demo", "seed=7", "--dry-run"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().out
    assert yaml.safe_load(said)["seed"] == 7
    assert "# GiB per worker" in said


def test_every_job_and_verb_has_its_function():
    from umarvel_ray import pipeline
    from umarvel_ray.cli import STORIES

    wanted = set(JOBS) | {function for function, _ in STORIES.values()}
    assert wanted <= vars(pipeline).keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demo", "stage1.text.batchsize=3"], ["unknown key", "stage1.text.batchsize"]),
        (["demo", "stage1.text.batch_size=many"], ["stage1.text.batch_size", "many"]),
        (["train", "nowhere"], ["nowhere", "qwen2vl-7b"]),
        (["train", "demo", "other"], ["one recipe"]),
        (["fly"], ["fly", "demo"]),
        ([], ["VERB"]),
        (["demo", "--colour"], ["--colour"]),
        (["search"], ["text", "--image"]),
        (["search", "fox", "--run", "nowhere"], ["nowhere", "make demo"]),
        (["search", "fox", "--top-k", "0"], ["--top-k"]),
        (["index", "nowhere", "out"], ["nowhere"]),
        (["export"], ["--to"]),
        (["export", "demo", "output=nowhere", "--to", "out"], ["nowhere", "text"]),
        (["serve", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["serve", "nowhere"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_line_and_status_2(words, said, tmp_path):
    output = [f"output={tmp_path}/run"] if words and words[0] == "demo" else []
    assert_one_line(run(UMARVEL, *words, *output), 2, *said)


@pytest.mark.parametrize(
    ("key", "said"), [("base", ["/nowhere/at/all", "config.json"]), ("data.root", ["/nowhere/at/all"])]
)
def test_a_folder_that_is_not_there_is_one_line(key, said, tmp_path, capsys):
    """In this process and without Ray, whose start would take most of the time."""
    from umarvel_ray.pipeline import stage1

    assert guard(lambda: stage1(Run.open(load_recipe("demo", [f"{key}=/nowhere/at/all", f"output={tmp_path}"])))) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in said)


def test_a_mistake_in_a_job_is_one_line_and_status_2():
    process = run(sys.executable, "jobs/stage3.py", "--recipe", "demo", "stage3.topk=3")
    assert_one_line(process, 2, "unknown key", "stage3.topk")


@pytest.mark.parametrize("output", ["a-file/run", "/proc/umarvel/run"])
def test_an_output_that_cannot_be_written_is_one_line(output, tmp_path):
    (tmp_path / "a-file").touch()
    assert_one_line(run(UMARVEL, "stage1", f"output={tmp_path / output}"), 2, "cannot write", output, "output=DIR")


def test_a_checkpoint_missing_under_a_later_stage_is_one_line(tmp_path):
    process = run(UMARVEL, "distill", f"output={tmp_path}/run", timeout=300)
    assert_one_line(process, 2, "hard-negatives")


@pytest.fixture
def bare_deepspeed(tmp_path) -> Path:
    """DeepSpeed as a plain `pip install` leaves it: none of its extensions built."""
    source = Path(deepspeed.__file__).parent
    copy = tmp_path / "deepspeed"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__", "git_version_info_installed.py"))
    return tmp_path


def test_no_compiler_and_nothing_built_is_one_line(bare_deepspeed, tmp_path):
    env = {"PYTHONPATH": str(bare_deepspeed), "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cold")}
    process = run(UMARVEL, "stage1", f"output={tmp_path}/run", env=env)
    assert_one_line(process, 2, "C++ compiler", "g++")
    assert not (tmp_path / "run").exists()


def test_what_setup_installs_needs_no_compiler(tmp_path):
    """The op loads and reduces with no compiler on PATH and a cold cache: `make setup` has built it."""
    code = (
        "import torch, torch.distributed as dist, deepspeed; deepspeed.init_distributed('gloo', verbose=False); "
        "x = torch.arange(4.0); deepspeed.comm.all_reduce(x); assert x.tolist() == [0, 1, 2, 3]"
    )
    ranks = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    env = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cold"), "DS_ACCELERATOR": "cpu"} | ranks
    process = run(sys.executable, "-c", code, env=env)
    assert process.returncode == 0, process.stderr
    assert not (tmp_path / "cold").exists()


@pytest.mark.parametrize(("missing", "said"), [("c++", "g++"), ("python3", "Python 3.11")])
def test_setup_names_a_missing_prerequisite(missing, said, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in {"bash", "make", "echo", "c++", "python3"} - {missing}:
        target = sys.executable if tool == "python3" else shutil.which(tool)
        (tools / tool).symlink_to(target)
    process = run(tools / "make", "--no-print-directory", "setup", f"VENV={tmp_path}/venv", env={"PATH": str(tools)})
    ours = [line for line in process.stderr.splitlines() if line.startswith("setup: ")]
    assert len(ours) == 1
    assert said in ours[0]
    assert process.returncode == 2
    assert not (tmp_path / "venv").exists()
