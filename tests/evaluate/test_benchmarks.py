"""`umarvel evaluate --benchmark`: its errors are one line each, and a whole run from a folder to the report."""

from __future__ import annotations

import shutil

import pytest

from tests.support.suite_folders import FOLDERS
from umarvel_ray.cli import main
from umarvel_ray.evaluate.benchmarks import Job, check_benchmark, evaluate_benchmark
from umarvel_ray.evaluate.suites import Protocol
from umarvel_ray.model.checkpoint import save_checkpoint
from umarvel_ray.model.embedding_model import EmbeddingModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sugarcrepe")
    FOLDERS["sugarcrepe"](root)
    return root


@pytest.fixture(scope="module")
def checkpoint(tiny_base, recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "mine"
    save_checkpoint(EmbeddingModel.from_pretrained(tiny_base, recipe.model), path, recipe.model, {"phase": "text"})
    return path


def job(folder, models, output, **changes) -> Job:
    settings = {
        "reranker": None,
        "protocol": Protocol(),
        "preset": None,
        "reranker_preset": None,
        "own_settings": False,
    }
    return Job("sugarcrepe", folder, list(map(str, models)), output=output, **settings | changes)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--benchmark", "imagenet", "--data", "{folder}", "--model", "x"],
            "no benchmark 'imagenet'; choose one of: mbeir",
        ),
        (["--benchmark", "circo"], "--benchmark needs --data DIR and --model CHECKPOINT"),
        (["--benchmark", "circo", "--data", "{folder}/no", "--model", "x"], "data folder {folder}/no does not exist"),
        (
            ["--benchmark", "circo", "--data", "{folder}", "--model", "x"],
            "{folder}/annotations/val.json: not found; CIRCO",
        ),
        (
            ["--benchmark", "sugarcrepe", "--data", "{folder}", "--model", "x", "--rerank-weight", "-1"],
            "--rerank-weight -1: give a number",
        ),
        (["--benchmark", "sugarcrepe", "--data", "{folder}", "--model", "{folder}"], "no config.json"),
    ],
)
def test_a_mistake_is_one_line(folder, tmp_path, capsys, ray_cluster, words, expected):
    words = [word.replace("{folder}", str(folder)) for word in words]
    assert main(["evaluate", *words, "--to", str(tmp_path / "out")]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("umarvel: ")]
    assert expected.replace("{folder}", str(folder)) in line


def test_a_dry_run_opens_the_folder_only(folder, tmp_path, capsys):
    words = ["evaluate", "--benchmark", "sugarcrepe", "--data", str(folder), "--dry-run", "--to", str(tmp_path)]
    assert main(words) == 0
    assert capsys.readouterr().out == "sugarcrepe: 14 queries, 28 documents, 7 tasks\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tables"]


def test_two_checkpoints_of_any_kind_stand_in_one_report(
    folder, checkpoint, tiny_base, reranker_ref, recipe, ray_cluster, tmp_path, capsys
):
    """One that says how to embed with it, and one that the authors released."""
    released = tmp_path / "released"
    shutil.copytree(tiny_base, released)
    rows = evaluate_benchmark(job(folder, [checkpoint], tmp_path / "out", reranker=reranker_ref.path), recipe)
    assert [row.model for row in rows] == ["mine", "mine + reranker"]
    [row] = evaluate_benchmark(job(folder, [released], tmp_path / "out", preset="reference"), recipe)
    assert row.model == "released"
    text = (tmp_path / "out/report/benchmarks.md").read_text()
    for model in ("mine", "mine + reranker", "released"):
        assert f"| **{model}** | measured |" in text
    assert "| U-MARVEL Qwen2-VL-7B | published |" in text
    assert "mine: SugarCrepe accuracy" in capsys.readouterr().out


def test_a_model_without_settings_is_named(folder, tiny_base, recipe, tmp_path):
    with pytest.raises(Exception, match=r"has no umarvel\.json, .* give the --preset of the system that released it"):
        evaluate_benchmark(job(folder, [tiny_base], tmp_path / "out"), recipe)


def test_tables_of_both_protocols_are_kept_apart(folder, tmp_path):
    for reference in (False, True):
        check_benchmark(job(folder, [], tmp_path, protocol=Protocol(reference=reference)))
    assert len(list((tmp_path / "tables/sugarcrepe").glob("test-*.arrow"))) == 2
    assert len(list((tmp_path / "tables/sugarcrepe").glob("documents-*.arrow"))) == 1
