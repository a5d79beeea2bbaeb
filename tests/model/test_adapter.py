"""Models published as a PEFT adapter: found with their base, merged, and refused in one line where they do not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from umarvel_ray.errors import UserError
from umarvel_ray.model.adapter import WEIGHTS
from umarvel_ray.model.backbone import load_backbone
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.hub import model_folder, model_ref
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.recipe import ModelSettings

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096, attention="causal", pooling="last")
ITEMS = ["a red fox", "the white house and the green tree"]


def make_adapter(base: Path, folder: Path, names: str = "model.layers.", **config) -> np.ndarray:
    """Write an adapter with random weights under the names of an old transformers, and return what it embeds to
    without being merged."""
    embedder = Embedder.from_pretrained(base, settings=SETTINGS)
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    lora = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": targets} | config)
    wrapped = get_peft_model(embedder.model.backbone, lora)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if ".lora_" in name:
                noise = torch.randn(weight.shape, generator=draw)
                weight.copy_(weight * (1 + 0.1 * noise) if "magnitude" in name else 0.2 * noise)
    wrapped.save_pretrained(folder)
    saved = load_file(folder / WEIGHTS)
    save_file(
        {name.replace("model.language_model.layers.", names): value for name, value in saved.items()}, folder / WEIGHTS
    )
    given = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "Org/" + base.name}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return embedder.encode_query(ITEMS)


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    return shutil.copytree(tiny_base, tmp_path / "Tiny-Base")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("names", ["model.layers.", "model.language_model.layers."])
def test_an_adapter_beside_its_base_is_merged(base, tmp_path, config, names):
    expected = make_adapter(base, tmp_path / "adapter", names, **config)
    vectors = Embedder.from_pretrained(tmp_path / "adapter", settings=SETTINGS).encode_query(ITEMS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    plain = Embedder.from_pretrained(base, settings=SETTINGS).encode_query(ITEMS)
    assert np.abs(plain - expected).max() > 0.01


def test_a_merged_model_is_plain(base, tmp_path):
    make_adapter(base, tmp_path / "adapter")
    backbone, _ = load_backbone(model_folder(tmp_path / "adapter"), SETTINGS)
    assert not any("lora" in name or "base_layer" in name for name, _ in backbone.named_parameters())
    assert all(weight.requires_grad for weight in backbone.parameters())


def test_the_base_may_be_given(base, tmp_path):
    expected = make_adapter(base, tmp_path / "adapter")
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is an adapter of Org/Tiny-Base: put that beside it, or give its directory"):
        Embedder.from_pretrained(tmp_path / "adapter", settings=SETTINGS)
    found = Embedder.from_pretrained(tmp_path / "adapter", settings=SETTINGS, base=moved).encode_query(ITEMS)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(UserError, match="no adapter; leave out base"):
        Embedder.from_pretrained(moved, settings=SETTINGS, base=moved)


def test_its_own_tokenizer_wins_and_a_change_is_another_model(base, tmp_path):
    adapter = tmp_path / "adapter"
    make_adapter(base, adapter)
    first = model_ref(adapter, "embedder", "gme")
    assert first == model_ref(adapter, "embedder", "gme")
    (adapter / "chat_template.jinja").write_text("other")
    assert (model_folder(adapter) / "chat_template.jinja").read_text() == "other"
    second = model_ref(adapter, "embedder", "gme")
    save_file({name: value + 1 for name, value in load_file(adapter / WEIGHTS).items()}, adapter / WEIGHTS)
    third = model_ref(adapter, "embedder", "gme")
    assert len({ref.identity for ref in (first, second, third)}) == 3
    assert first.path == third.path


def test_rerankers_too(base, tmp_path):
    make_adapter(base, tmp_path / "adapter")
    scores = [
        Reranker.from_pretrained(path, preset="lamra-rank").score("a", ITEMS) for path in (tmp_path / "adapter", base)
    ]
    assert np.abs(scores[0] - scores[1]).max() > 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "a PEFT adapter of type IA3; use one of type LORA"),
        ({"alpha_pattern": {"q_proj": 3}}, "made with alpha_pattern, which is not supported; merge it"),
        ({"r": 8}, "does not fit this model .*; use the adapter's own base"),
        ({"base_model_name_or_path": None}, "no 'base_model_name_or_path'; give the base model's directory"),
    ],
)
def test_what_does_not_fit_is_one_line(base, tmp_path, change, message):
    adapter = tmp_path / "adapter"
    make_adapter(base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message) as error:
        Embedder.from_pretrained(adapter, settings=SETTINGS)
    assert "\n" not in str(error.value)


def test_layers_that_do_not_exist_and_missing_weights(base, tmp_path):
    adapter = tmp_path / "adapter"
    make_adapter(base, adapter)
    saved = load_file(adapter / WEIGHTS)
    save_file({name.replace("layers.0", "layers.77"): value for name, value in saved.items()}, adapter / WEIGHTS)
    with pytest.raises(UserError, match=r"'model\.language_model\.layers\.77\.\S+' is no layer of this model"):
        Embedder.from_pretrained(adapter, settings=SETTINGS)
    save_file(dict(list(saved.items())[1:]), adapter / WEIGHTS)
    with pytest.raises(UserError, match="is missing or unknown; copy it again"):
        Embedder.from_pretrained(adapter, settings=SETTINGS)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: missing"):
        Embedder.from_pretrained(adapter, settings=SETTINGS)
