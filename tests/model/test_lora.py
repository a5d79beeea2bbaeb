"""Adapters: only on the language model, merged exactly, readable by peft."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.model.batch import collate
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.lora import add_lora, merge_lora, save_adapter
from umarvel_ray.recipe import Lora, ModelSettings

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096)
LORA = Lora(r=4, alpha=8, dropout=0.0)


@pytest.fixture
def model(tiny_base) -> EmbeddingModel:
    return EmbeddingModel.from_pretrained(tiny_base, SETTINGS).eval()


@pytest.fixture(scope="module")
def batch(tiny_base):
    encoder = ItemEncoder.from_pretrained(tiny_base, SETTINGS)
    return collate([encoder.encode(t, "query") for t in ("a red fox", "two boats near a pier")])


def train_adapters(model: EmbeddingModel) -> None:
    """Give the second factors, which start at zero, random values."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_exactly_the_language_models_linear_layers_are_trained(model):
    add_lora(model, LORA, seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad} - {"log_temperature"}
    places = {re.sub(r"\.lora_[AB]\.default\.weight$", "", n) for n in trained}
    assert places == {
        f"backbone.model.language_model.layers.{i}.{part}"
        for i in range(2)
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    assert len(trained) == 2 * len(places)


def test_fresh_adapters_change_nothing_and_depend_only_on_the_seed(tiny_base, model, batch):
    with torch.no_grad():
        before = model(batch)
        add_lora(model, LORA, seed=3)
        assert torch.equal(model(batch), before)
    torch.manual_seed(99)
    other = EmbeddingModel.from_pretrained(tiny_base, SETTINGS)
    add_lora(other, LORA, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    third = EmbeddingModel.from_pretrained(tiny_base, SETTINGS)
    add_lora(third, LORA, seed=4)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), third.parameters(), strict=True))


def test_gradients_reach_every_adapter_but_not_the_temperature(model, batch):
    add_lora(model, LORA, seed=0)
    train_adapters(model)
    model(batch)[0, 0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_" in n)
    assert model.log_temperature.grad is None
    torch.testing.assert_close(model.log_temperature.exp().item(), 0.05)


def test_merging_adds_the_scaled_product_and_restores_the_names(tiny_base, model, batch):
    base = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    add_lora(model, LORA, seed=0)
    train_adapters(model)
    factors = {n: p.detach().clone() for n, p in model.backbone.named_parameters() if "lora_" in n}
    with torch.no_grad():
        adapted = model(batch)
        merge_lora(model)
        merged = model(batch)
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=0)
    state = model.backbone.state_dict()
    assert list(state) == list(base)
    for name, value in base.items():
        a = factors.get(name.replace(".weight", ".lora_A.default.weight"))
        if a is None:
            assert torch.equal(state[name], value), name
        else:
            b = factors[name.replace(".weight", ".lora_B.default.weight")]
            torch.testing.assert_close(state[name], value + (8 / 4) * b @ a, atol=1e-6, rtol=1e-5)


def test_peft_can_read_the_saved_adapter(tiny_base, model, batch, tmp_path):
    add_lora(model, LORA, seed=0)
    train_adapters(model)
    save_adapter(model, LORA, tmp_path)
    other = EmbeddingModel.from_pretrained(tiny_base, SETTINGS).eval()
    PeftModel.from_pretrained(other.backbone, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(other(batch), model(batch))


@pytest.mark.parametrize("layers", ["model.layers", "language_model.model.layers"])
def test_adapters_under_the_names_of_older_transformers_are_taken(tiny_base, model, batch, tmp_path, layers):
    """As adapters on the Hub have them, such as vidore/colqwen2-v1.0's."""
    add_lora(model, LORA, seed=0)
    train_adapters(model)
    save_adapter(model, LORA, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("model.language_model.layers", layers): v for k, v in load_file(file).items()}, file)
    other = EmbeddingModel.from_pretrained(tiny_base, SETTINGS).eval()
    add_lora(other, LORA.model_copy(update={"init": str(tmp_path)}), seed=1)
    with torch.no_grad():
        assert torch.equal(other(batch), model(batch))


def test_what_is_not_a_lora_adapter_is_one_line(tiny_base, model, tmp_path):
    add_lora(model, LORA, seed=0)
    save_adapter(model, LORA, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="a PEFT adapter of type IA3; use one of type LORA"):
        add_lora(
            EmbeddingModel.from_pretrained(tiny_base, SETTINGS), LORA.model_copy(update={"init": str(tmp_path)}), 0
        )
