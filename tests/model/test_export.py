"""`umarvel export`: a release is the checkpoint itself, with its scores and without paths of this machine."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from umarvel_ray.cli import main
from umarvel_ray.model.checkpoint import read_provenance, save_checkpoint
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.reranker import Reranker, RerankerModel
from umarvel_ray.recipe import ModelSettings

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096)
ITEMS = [{"text": "a red fox", "instruction": "find it"}, "harbour lights"]


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory):
    """A run with two embedders, a reranker and an evaluation of both embedders."""
    folder = tmp_path_factory.mktemp("run")
    record = {"parent": str(folder / "checkpoints/base"), "recipe": {"name": "demo", "data": {"root": str(folder)}}}
    model = EmbeddingModel.from_pretrained(tiny_base, SETTINGS)
    for phase in ("text", "instruction"):
        save_checkpoint(model, folder / "checkpoints" / phase, SETTINGS, record | {"phase": phase})
    settings = SETTINGS.for_reranker(64)
    reranker = RerankerModel.from_pretrained(tiny_base, settings)
    save_checkpoint(reranker, folder / "checkpoints" / "reranker", settings, record | {"phase": "reranker"})
    scores = {"caption": 0.75, "average": 0.75}
    chance = {"local": dict.fromkeys(scores, 0.25), "global": dict.fromkeys(scores, 0.125)}
    ladder = [{"step": "text", "local": scores, "global": dict.fromkeys(scores, 0.5)}]
    (folder / "report").mkdir()
    report = {"ladder": ladder, "chance": chance, "k": {"caption": 5}, "details": {}}
    (folder / "report/metrics.json").write_text(json.dumps(report))
    return folder


def export(run, target, *options) -> int:
    return main(["export", "demo", f"output={run}", "--to", str(target), *map(str, options)])


def test_a_release_is_the_checkpoint(run, tmp_path):
    assert export(run, tmp_path / "out", "--phase", "text", "--license", "mit") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before, after = (Embedder.from_pretrained(path) for path in (run / "checkpoints/text", tmp_path / "out"))
    assert np.array_equal(after.encode_query(ITEMS), before.encode_query(ITEMS))
    text = (tmp_path / "out/README.md").read_text()
    assert ModelCard(text).data.license == "mit"
    assert "| caption | 5 | 0.75 | 0.25 | 0.5 | 0.125 |" in text
    record = read_provenance(tmp_path / "out")
    assert (record["phase"], record["parent"]) == ("text", "base")
    assert str(run) not in json.dumps(record) + text


def test_the_last_finished_phase_is_the_default(run, tmp_path):
    assert export(run, tmp_path / "out") == 0
    assert read_provenance(tmp_path / "out")["phase"] == "instruction"
    assert "## Evaluation" not in (tmp_path / "out/README.md").read_text()  # that phase was not evaluated


def test_weights_in_bfloat16(run, tmp_path):
    assert export(run, tmp_path / "out", "--phase", "text", "--dtype", "bfloat16") == 0
    assert {value.dtype for value in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    before, after = (Embedder.from_pretrained(path) for path in (run / "checkpoints/text", tmp_path / "out"))
    cosines = (before.encode_query(ITEMS) * after.encode_query(ITEMS)).sum(axis=1)
    assert cosines.min() > 0.999


def test_a_reranker_can_be_released(run, tmp_path):
    assert export(run, tmp_path / "out", "--phase", "reranker") == 0
    assert len(Reranker.from_pretrained(tmp_path / "out").score("a fox", ["a red fox"])) == 1
    assert not (tmp_path / "out/modules.json").exists()


def test_missing_files_of_an_older_checkpoint_are_added(run, tmp_path):
    for name in ("modules.json", "README.md", "umarvel_embedding.py"):
        (run / "checkpoints/instruction" / name).unlink(missing_ok=True)
    assert export(run, tmp_path / "out") == 0
    assert {"modules.json", "README.md", "umarvel_embedding.py"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_nonempty_target_is_refused_and_an_empty_one_accepted(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert export(run, tmp_path / "out") == 0
    (tmp_path / "out/mine").touch()
    assert export(run, tmp_path / "out") == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "out/mine").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--phase", "fly"], "no phase 'fly'"), (["--phase", "distillation"], "'distillation' first")],
)
def test_a_phase_without_a_checkpoint_is_a_one_line_error(run, tmp_path, capsys, options, message):
    assert export(run, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not any(tmp_path.iterdir())
