"""Presets: which there are, and one line for a wrong one."""

import json
from pathlib import Path

import pytest

from umarvel_ray.errors import UserError
from umarvel_ray.presets import preset_settings, presets
from umarvel_ray.recipe import ModelSettings

EMBEDDERS = {"gme", "lamra-ret", "qwen3-vl-embedding", "reference", "unime-v2", "vlm2vec-v1", "vlm2vec-v2"}
RERANKERS = {"lamra-rank", "qwen3-vl-reranker"}


def folder_of(tmp_path: Path, model_type: str) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return tmp_path


def test_all_presets_are_valid_and_survive_a_checkpoints_record():
    assert presets("embedder").keys() == EMBEDDERS
    assert presets("reranker").keys() == RERANKERS
    for kind in ("embedder", "reranker"):
        for name, preset in presets(kind).items():
            for model_type in preset.models:
                settings = preset.of(model_type)
                assert ModelSettings.model_validate(settings.model_dump(mode="json")) == settings
                assert (settings.message is None) == (kind == "reranker" or name == "reference")
                assert (settings.pair is None) == (kind == "embedder")


def test_the_reference_is_what_it_was():
    settings = presets("embedder")["reference"].of("qwen3_vl")
    assert settings == ModelSettings(
        positions="sequential", deepstack=False, generation_prompt=True, resize_twice=True, max_text_tokens=1024
    )


def test_settings_depend_on_the_model_type(tmp_path):
    assert preset_settings("lamra-ret", "embedder", folder_of(tmp_path, "qwen2_vl")).positions == "sequential"
    assert preset_settings("lamra-ret", "embedder", folder_of(tmp_path, "qwen2_5_vl")).positions == "mrope"


@pytest.mark.parametrize(
    ("name", "kind", "model_type", "message"),
    [
        ("gmee", "embedder", "qwen2_vl", r"unknown preset 'gmee'; those for an embedder are gme, lamra-ret, "),
        ("lamra-rank", "embedder", "qwen2_vl", "preset 'lamra-rank' is for a reranker; those for an embedder are gme"),
        ("gme", "reranker", "qwen2_vl", "preset 'gme' is for an embedder; those for a reranker are lamra-rank, qwen3"),
        ("gme", "embedder", "qwen3_vl", "preset 'gme' is for model_type qwen2_vl, not 'qwen3_vl'"),
    ],
)
def test_a_wrong_preset_is_one_line(tmp_path, name, kind, model_type, message):
    with pytest.raises(UserError, match=message) as error:
        preset_settings(name, kind, folder_of(tmp_path, model_type))
    assert "\n" not in str(error.value)


def test_a_directory_without_a_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no model_type to be read"):
        preset_settings("gme", "embedder", tmp_path)
