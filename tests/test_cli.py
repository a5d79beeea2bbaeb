"""The command line in a process of its own: what it prints, where, and its exit status."""

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
from umarvel_ray.cli import JOB_VERBS, guard
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


def assert_one_line(process: subprocess.CompletedProcess, status: int, *words: str) -> None:
    """All of stderr is one line that contains all of `words`."""
    lines = process.stderr.splitlines()
    assert len(lines) == 1, process.stderr
    assert process.returncode == status
    for word in words:
        assert word in lines[0]


def test_help_is_quick_and_lists_the_verbs():
    process = run(UMARVEL, "--help", timeout=20)
    assert process.returncode == 0
    for verb in (
        "demo",
        "train",
        "train-stage1",
        "mine",
        "train-stage2",
        "train-reranker",
        "train-stage3",
        "embed",
        "import",
        "index",
        "search",
        "evaluate",
        "export",
        "serve",
    ):
        assert re.search(rf"^    {verb}\s", process.stdout, re.MULTILINE), verb


def test_light_commands_load_neither_torch_nor_ray():
    code = (
        "import sys; from umarvel_ray.cli import main; assert main(['demo', '--dry-run']) == 0; "
        "assert not {'torch', 'ray', 'transformers'} & sys.modules.keys()"
    )
    assert run(sys.executable, "-c", code).returncode == 0


def test_a_dry_run_prints_the_resolved_recipe_and_creates_nothing(tmp_path):
    process = run(UMARVEL, "demo", "seed=7", "--dry-run", f"output={tmp_path}/run")
    assert process.returncode == 0
    tree = yaml.safe_load(process.stdout)
    assert (tree["name"], tree["seed"], tree["stage3"]["alpha"]) == ("demo", 7, 0.5)
    assert re.search(r"^# stage2\.train ", process.stdout, re.MULTILINE)
    assert not (tmp_path / "run").exists()


def test_models_from_elsewhere_are_overrides(tmp_path):
    words = ["--model", "a: b", "--preset", "gme", "--reranker", "c", "--reranker-preset", "lamra-rank", "--dry-run"]
    process = run(UMARVEL, "evaluate", "demo", f"output={tmp_path}/run", *words)
    given = yaml.safe_load(process.stdout)["evaluate"]
    assert (given["checkpoint"], given["preset"]) == ("a: b", "gme")
    assert (given["reranker"], given["reranker_preset"]) == ("c", "lamra-rank")
    process = run(UMARVEL, "embed", "demo", f"output={tmp_path}/run", *words[:4], "--dry-run")
    assert yaml.safe_load(process.stdout)["embed"]["checkpoint"] == "a: b"


def test_a_reader_that_has_gone_ends_the_work_without_a_word():
    """As `umarvel … | head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "umarvel_ray.cli", "demo", "--dry-run"]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=REPO, timeout=120, check=False)
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


def test_what_the_terminal_cannot_show_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"query": "q{n}", "pos": ["é{n}"]}}\n' for n in range(20)))
    command = [sys.executable, "-m", "umarvel_ray.cli", "import", tmp_path / "a.jsonl", "--to", tmp_path / "out"]
    process = run(*command, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    assert (process.returncode, process.stderr) == (0, "")
    assert re.search(r"\?q\d+\? \? \?\?\d+\?", process.stdout)
    assert (tmp_path / "out").is_dir()


def test_paths_may_begin_with_the_home_folder_and_may_not_be_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"query": "q{n}", "pos": ["p{n}"]}}\n' for n in range(20)))
    command = [sys.executable, "-m", "umarvel_ray.cli", "import"]
    process = run(*command, "~/a.jsonl", "--to", "~/out", env={"HOME": str(tmp_path)})
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "recipe.yaml").is_file()
    assert_one_line(run(*command, "", "--to", "out"), 2, "the path is empty")


@pytest.mark.parametrize("job", JOBS)
def test_each_job_is_a_plain_script(job, monkeypatch, capsys):
    """In this process, to save eight starts of Python; a test below runs a job in a process of its own."""
    script = str(REPO / "jobs" / f"{job}.py")
    monkeypatch.setattr(sys, "argv", [script, "--recipe", "demo", "seed=7", "--dry-run"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(script, run_name="__main__")
    output = capsys.readouterr().out
    assert yaml.safe_load(output)["seed"] == 7
    assert "# GiB per worker" in output


def test_every_job_and_verb_has_its_function():
    from umarvel_ray import pipeline

    assert set(JOBS) | {job for job, _ in JOB_VERBS.values()} <= pipeline.JOBS.keys()
    assert {path.stem for path in (REPO / "jobs").glob("*.py")} == set(JOBS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "stage1.text.batchsize=3"], ["unknown key", "stage1.text.batchsize"]),
        (["demo", "stage1.text.batch_size=many"], ["stage1.text.batch_size", "many"]),
        (["train", "nowhere"], ["nowhere", "qwen2vl-7b"]),
        (["train", "demo", "other"], ["one recipe"]),
        (["fly"], ["fly", "demo"]),
        ([], ["VERB"]),
        (["demo", "--shade"], ["--shade"]),
        (["demo", "--dry-run", "--shade", "seed=7"], ["--shade"]),
        (["search", "a", "--rerank", "b"], ["b"]),
        (["search"], ["text", "--image"]),
        (["search", "fox", "--run", "nowhere"], ["nowhere", "make demo"]),
        (["search", "fox", "--top-k", "0"], ["--top-k"]),
        (["index", "nowhere", "out"], ["nowhere"]),
        (["export"], ["--to"]),
        (["export", "demo", "output=nowhere", "--to", "out"], ["nowhere", "text"]),
        (["serve", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["serve", "nowhere"], ["nowhere"]),
        (["evaluate", "--preset", "gme"], ["--preset needs --model"]),
        (["evaluate", "--model", "a", "--reranker-preset", "b"], ["--reranker-preset needs --reranker"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_one_line_and_status_2(words, message, tmp_path):
    output = [f"output={tmp_path}/run"] if words and words[0] == "demo" else []
    assert_one_line(run(UMARVEL, *words, *output), 2, *message)


@pytest.mark.parametrize(
    ("key", "message"), [("base", ["/nowhere/at/all", "config.json"]), ("data.root", ["/nowhere/at/all"])]
)
def test_a_missing_folder_is_one_line(key, message, tmp_path, capsys):
    """In this process and without Ray, whose start would take most of the time."""
    from umarvel_ray.pipeline import train_stage1

    recipe = load_recipe("demo", [f"{key}=/nowhere/at/all", f"output={tmp_path}"])
    assert guard(lambda: train_stage1(Run.open(recipe))) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert all(word in line for word in message)


def test_a_mistake_in_a_job_is_one_line_and_status_2():
    process = run(sys.executable, "jobs/stage3.py", "--recipe", "demo", "stage3.topk=3")
    assert_one_line(process, 2, "unknown key", "stage3.topk")


@pytest.mark.parametrize("output", ["a-file/run", "/proc/umarvel/run"])
def test_an_output_that_cannot_be_written_is_one_line(output, tmp_path):
    (tmp_path / "a-file").touch()
    assert_one_line(
        run(UMARVEL, "train-stage1", f"output={tmp_path / output}"), 2, "cannot write", output, "output=DIR"
    )


def test_a_missing_parent_checkpoint_is_one_line(tmp_path):
    process = run(UMARVEL, "train-stage3", f"output={tmp_path}/run", timeout=300)
    assert_one_line(process, 2, "hard-negatives")


@pytest.fixture
def bare_deepspeed(tmp_path) -> Path:
    """A folder with DeepSpeed as a plain `pip install` leaves it: with none of its extensions built."""
    source = Path(deepspeed.__file__).parent
    folder = tmp_path / "packages"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "git_version_info_installed.py")
    shutil.copytree(source, folder / "deepspeed", ignore=ignored)
    return folder


TRAIN_ONE_STEP = """
import deepspeed, torch, torch.distributed
from umarvel_ray.recipe import Compute, Phase
from umarvel_ray.train.engine import make_engine, start_step

assert deepspeed.__file__.startswith({folder!r})
torch.distributed.init_process_group("gloo")  # as Ray Train does
phase = Phase(queries="train", batch_size=1, learning_rate=1e-2, language_model="full")
for stage in (0, 1, 2, 3):
    module = torch.nn.Linear(4, 4)
    engine = make_engine(module, phase, Compute(zero_stage=stage, dtype="float32"))
    before = engine(torch.ones(1, 4)).sum()
    start_step(engine, 1e-2)
    engine.backward(before)
    engine.step()
    assert engine(torch.ones(1, 4)).sum() < before
"""


def test_training_needs_no_compiler_and_builds_nothing(bare_deepspeed, tmp_path):
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    without = {
        "PATH": str(tmp_path),
        "CXX": "/nonexistent",
        "CC": "/nonexistent",
        "PYTHONPATH": os.pathsep.join([str(bare_deepspeed), str(REPO)]),
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "DS_ACCELERATOR": "cpu",
    }
    rank = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    code = TRAIN_ONE_STEP.format(folder=str(bare_deepspeed))
    process = run(sys.executable, "-c", code, env=without | rank, timeout=300)
    assert process.returncode == 0, process.stderr
    assert list(extensions.iterdir()) == []


PYTHONS = {
    "Python 3.11": None,
    "no venv module": f'case "$*" in *ensurepip*) exit 1;; *) exec "{sys.executable}" "$@";; esac',
}


@pytest.mark.parametrize("message", PYTHONS)
def test_setup_names_a_missing_prerequisite(message, tmp_path):
    """There is no C++ compiler on PATH either, and setup does not miss it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "make", "echo"):
        (tools / tool).symlink_to(shutil.which(tool))
    if script := PYTHONS[message]:
        python = tools / "python3"
        python.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        python.chmod(0o755)
    process = run(tools / "make", "--no-print-directory", "setup", f"VENV={tmp_path}/venv", env={"PATH": str(tools)})
    [line] = [line for line in process.stderr.splitlines() if line.startswith("setup: ")]
    assert message in line
    assert process.returncode == 2
    assert not (tmp_path / "venv").exists()
