"""Attention follows the settings, and loading proves it; embeddings of new tokens; directories that are refused."""

import json
import shutil

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from umarvel_ray.errors import UserError
from umarvel_ray.model.backbone import load_backbone, probe_attention
from umarvel_ray.recipe import ModelSettings

BIDIRECTIONAL, CAUSAL = ModelSettings(), ModelSettings(attention="causal")


def first_state(model, second: int, padding: int) -> torch.Tensor:
    """The first of two tokens' hidden state, computed by the whole stock model."""
    ids = torch.tensor([[40, second] + [0] * padding])
    mask = torch.tensor([[1, 1] + [0] * padding])
    with torch.no_grad():
        return model.model(input_ids=ids, attention_mask=mask).last_hidden_state[0, 0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 2])
def test_the_setting_decides_whether_a_token_sees_the_next(family_base, implementation, padding):
    for settings, sees in ((BIDIRECTIONAL, True), (CAUSAL, False)):
        model, _ = load_backbone(family_base, settings)
        model.set_attn_implementation(implementation)
        difference = (first_state(model, 41, padding) - first_state(model, 42, padding)).abs().max()
        assert (difference > 1e-3) if sees else (difference == 0.0)
        probe_attention(model, settings.attention)


def test_the_probe_catches_attention_that_did_not_take_effect(family_base):
    for loaded, claimed in ((CAUSAL, "bidirectional"), (BIDIRECTIONAL, "causal")):
        model, _ = load_backbone(family_base, loaded)
        with pytest.raises(UserError, match=f"attention '{claimed}' did not take effect.*install transformers"):
            probe_attention(model, claimed)


def test_the_probe_catches_a_mask_ignored_only_without_padding(family_base):
    """The reference's failure: bidirectional with padding, causal without (docs/method.md#causal-without-padding)."""
    model, _ = load_backbone(family_base, BIDIRECTIONAL)

    def like_the_reference(_, args, kwargs):
        model.config.text_config.is_causal = bool(kwargs["attention_mask"].all())

    model.model.language_model.register_forward_pre_hook(like_the_reference, with_kwargs=True)
    with pytest.raises(UserError, match="did not take effect"):
        probe_attention(model, "bidirectional")


def test_causal_loading_changes_nothing_in_the_stock_model(tiny_base):
    stock = Qwen2VLForConditionalGeneration.from_pretrained(tiny_base).eval()
    model, tokenizer = load_backbone(tiny_base, CAUSAL)
    ids = torch.tensor([tokenizer("Two boats near a pier.").input_ids])
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits[..., : expected.shape[-1]], expected)


def test_the_three_new_tokens_get_their_own_rows_the_same_in_every_process(tiny_base):
    model, tokenizer = load_backbone(tiny_base, BIDIRECTIONAL)
    ids = tokenizer.convert_tokens_to_ids(["<emb>", "<instruction_start>", "<instruction_end>"])
    old = json.loads((tiny_base / "config.json").read_text())["text_config"]["vocab_size"]
    assert ids == [old, old + 1, old + 2]
    table = model.get_input_embeddings().weight
    assert table.shape[0] == len(tokenizer) == model.config.text_config.vocab_size
    torch.manual_seed(123)
    again = load_backbone(tiny_base, BIDIRECTIONAL)[0].get_input_embeddings().weight
    assert torch.equal(table, again)
    assert table[ids].unique(dim=0).shape[0] == 3
    assert 0.3 < table[ids].std() / table[:old].std() < 3


def test_bfloat16_loads_and_is_probed(tiny_base):
    for settings in (BIDIRECTIONAL, CAUSAL):
        model, _ = load_backbone(tiny_base, settings, "bfloat16")
        assert model.dtype == torch.bfloat16


@pytest.fixture
def copy(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "copy")


def test_an_unsupported_architecture_is_refused(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"config.json: model_type 'bert' is not supported; use a Qwen2-VL, Qwen2.5-VL"):
        load_backbone(copy, BIDIRECTIONAL)


def test_a_directory_without_a_model_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no config.json"):
            load_backbone(path, BIDIRECTIONAL)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_named(copy, size):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"model.safetensors: truncated or damaged; copy the checkpoint again"):
        load_backbone(copy, BIDIRECTIONAL)


def test_missing_weights_and_shards_are_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors: missing"):
        load_backbone(copy, BIDIRECTIONAL)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002.safetensors: missing"):
        load_backbone(copy, BIDIRECTIONAL)


def test_an_invalid_config_is_named(copy):
    (copy / "config.json").write_text('{"model_type": "qwen2_vl", ')
    with pytest.raises(UserError, match=r"config.json") as error:
        load_backbone(copy, BIDIRECTIONAL)
    assert "\n" not in str(error.value)


def test_weights_of_another_shape_are_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no weights for 'model.language_model.layers.2"):
        load_backbone(copy, BIDIRECTIONAL)
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "intermediate_size": 32}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no weights for '.*mlp"):
        load_backbone(copy, BIDIRECTIONAL)
