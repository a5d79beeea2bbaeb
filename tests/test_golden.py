"""What the reference code itself computed: pooled vectors, matched to 1e-5, and conversations, matched exactly.

tests/golden/README.md says what each file holds and where it comes from.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen3VLConfig

from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.items.pictures import Picture
from umarvel_ray.model.batch import ItemBatch
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.multimodal import split_features
from umarvel_ray.model.pooling import pool
from umarvel_ray.presets import read_preset

GOLDEN = Path(__file__).resolve().parent / "golden"
CASES = json.loads((GOLDEN / "qwen2vl_messages.json").read_text())["cases"]

REFERENCE = read_preset("reference").of("qwen2_vl")
NO_PIXELS = np.empty((0, 0), np.uint8)
TEXT = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "qwen2vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14},
    "qwen3vl": {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}
CONFIGS = {"qwen2vl": Qwen2VLConfig, "qwen3vl": Qwen3VLConfig}


@pytest.fixture(scope="module", params=["qwen2vl", "qwen3vl"])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(family) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{family}_tiny.safetensors")


@pytest.fixture(scope="module")
def directory(family, golden, tmp_path_factory) -> Path:
    """The golden state as a checkpoint with the reference's tensor names, including `sim.temp`.

    The output head is not stored: no hidden state depends on it, but a complete checkpoint has one.
    """
    folder = tmp_path_factory.mktemp(family)
    state = {name.removeprefix("state/"): value for name, value in golden.items() if name.startswith("state/")}
    assert "sim.temp" in state
    assert ("model.embed_tokens.weight" in state) == (family == "qwen2vl")
    state["lm_head.weight"] = torch.zeros(TEXT["vocab_size"], TEXT["hidden_size"])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    vision = VISION[family] | {"num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    CONFIGS[family](
        text_config=TEXT,
        vision_config=vision,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    names = ["<pad>", "<bos>", "<eos>", "<vision_start>", "<vision_end>", "<|image_pad|>", "<|video_pad|>"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(folder)
    picture = {"patch_size": vision["patch_size"], "merge_size": 2, "temporal_patch_size": 2}
    picture |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture))
    return folder


@pytest.fixture(scope="module")
def model(directory) -> EmbeddingModel:
    return EmbeddingModel.from_pretrained(directory, REFERENCE).eval()


def reference_batch(golden, rows: slice = slice(None)) -> ItemBatch:
    """The reference's own batch: padded on the left, with positions that count the padding."""
    ids, mask = golden["io/input_ids"][rows], golden["io/attention_mask"][rows]
    pictures = int((golden["io/image_grid_thw"]).shape[0])
    return ItemBatch(
        input_ids=ids,
        attention_mask=mask,
        pool_mask=mask.bool(),
        positions=torch.arange(ids.shape[1]).expand(3, *ids.shape),
        bounds=None,
        longest=ids.shape[1],
        pictures=tuple(Picture(NO_PIXELS, (1, 1, 1), str(n)) for n in range(pictures)),
    )


def tower_output(model, golden) -> dict[str, torch.Tensor]:
    """The tower's features of the golden pixels, which are floats, by the picture keys above."""
    features = split_features(model.backbone.model.visual, golden["io/pixel_values"], golden["io/image_grid_thw"])
    return {str(n): feature for n, feature in enumerate(features)}


def right_padded(golden) -> ItemBatch:
    """The same items as this project batches them: padded on the right, positions from each item's first token."""
    batch = reference_batch(golden)
    shift = (batch.attention_mask == 0).sum(1).tolist()

    def rolled(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(-n) for row, n in zip(x, shift, strict=True)])

    return ItemBatch(
        **{
            **vars(batch),
            "input_ids": rolled(batch.input_ids),
            "attention_mask": rolled(batch.attention_mask),
            "pool_mask": rolled(batch.pool_mask),
        }
    )


@torch.no_grad()
def test_plain_mean_matches_the_reference(model, golden):
    batch = reference_batch(golden)
    ours = pool(model.hidden_states(batch, tower_output(model, golden)), batch.pool_mask)
    torch.testing.assert_close(ours, golden["io/expected_plain"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_instruction_masked_mean_matches_the_reference(model, golden):
    batch = reference_batch(golden)
    span = golden["io/instruction_mask"].bool()
    assert span.any(dim=1).any()
    ours = pool(model.hidden_states(batch, tower_output(model, golden)), batch.pool_mask & ~span)
    theirs = golden["io/expected_instruction_masked"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs - golden["io/expected_plain"]).abs().max() > 1e-2


@torch.no_grad()
def test_right_padding_gives_the_same_unit_vectors(model, golden):
    expected = golden["io/expected_plain"] / golden["io/expected_plain"].norm(dim=1, keepdim=True)
    torch.testing.assert_close(model(right_padded(golden), tower_output(model, golden)), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_unpadded_item_equals_its_padded_golden_vector(model, golden):
    """The reference turns causal here and is 1.3 away from itself (docs/method.md#causal-without-padding)."""
    batch = right_padded(golden)
    text_only = [i for i in range(len(batch)) if not (batch.input_ids[i] == 5).any()]
    assert text_only
    for row in text_only:
        length = int(batch.attention_mask[row].sum())
        alone = ItemBatch(
            input_ids=batch.input_ids[row : row + 1, :length],
            attention_mask=batch.attention_mask[row : row + 1, :length],
            pool_mask=batch.pool_mask[row : row + 1, :length],
            positions=batch.positions[:, row : row + 1, :length],
            bounds=None,
            longest=length,
            pictures=(),
        )
        expected = golden["io/expected_plain"][row]
        torch.testing.assert_close(
            pool(model.hidden_states(alone, {}), alone.pool_mask)[0], expected, atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_causal_attention_is_far_from_the_reference(directory, golden):
    causal = EmbeddingModel.from_pretrained(directory, REFERENCE.model_copy(update={"attention": "causal"}))
    batch = reference_batch(golden)
    ours = pool(causal.eval().hidden_states(batch, tower_output(causal, golden)), batch.pool_mask)
    assert np.abs((ours - golden["io/expected_plain"]).numpy()).max() > 0.1


def test_the_saved_checkpoint_has_current_names(model, tmp_path):
    model.backbone.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert "sim.temp" not in names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["is_causal"] is False


def reference_encoder(folder: Path, generation_prompt: bool) -> ItemEncoder:
    """The encoder of a Qwen2-VL directory, with the reference's settings."""
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    return ItemEncoder.from_pretrained(folder, REFERENCE.model_copy(update={"generation_prompt": generation_prompt}))


def encode(encoder: ItemEncoder, case: dict):
    item = {"text": case["text"], "instruction": case.get("instruction")}
    if case["image"]:
        width, height = case["image"]
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        item["image"] = Image.fromarray(pixels)
    return encoder.encode(item, case["side"])


@pytest.fixture(scope="module", params=[False, True], ids=["no-generation-prompt", "generation-prompt"])
def generation_prompt(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def spelled(generation_prompt, tmp_path_factory) -> ItemEncoder:
    """Qwen2-VL's chat template and special tokens; every other token is a byte, so that decoding restores the text."""
    folder = tmp_path_factory.mktemp("spelled")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelling = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling.decoder = decoders.ByteLevel()
    spelling.add_special_tokens(
        ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    )
    PreTrainedTokenizerFast(tokenizer_object=spelling).save_pretrained(folder)
    shutil.copyfile(GOLDEN / "qwen2vl_chat_template.json", folder / "chat_template.json")
    picture = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    picture |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture))
    return reference_encoder(folder, generation_prompt)


@pytest.fixture(scope="module")
def released(shared_dir, generation_prompt, tmp_path_factory) -> ItemEncoder:
    """Qwen2-VL's own tokenizer, chat template and image processor, several MB outside the repository."""
    source = shared_dir / "data" / "qwen2vl_tokenizer"
    if not source.is_dir():
        pytest.skip("Qwen2-VL's tokenizer is not installed; see tests/golden/README.md")
    folder = tmp_path_factory.mktemp("released") / "qwen2vl"
    return reference_encoder(shutil.copytree(source, folder, copy_function=shutil.copyfile), generation_prompt)


def case_name(case: dict) -> str:
    return f"{case['side']}-{case['text']}-{case['image']}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_conversations_render_as_in_the_reference(case, generation_prompt, spelled):
    encoded = encode(spelled, case)
    decode = spelled.tokenizer.decode
    rendered = re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", decode(encoded.input_ids))
    assert rendered == case["rendered"] + "<|im_start|>assistant\n" * generation_prompt
    theirs = case[f"input_ids_generation_prompt_{str(generation_prompt).lower()}"]
    assert np.isin(encoded.input_ids, spelled.picture_token_ids).sum() == theirs.count(151655)
    span = re.search("<instruction_start>.*<instruction_end>", case["rendered"])
    assert (span is None) == (case.get("instruction") is None)
    assert decode(encoded.input_ids[~encoded.pool_mask]) == (span[0] if span else "")


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_token_ids_equal_the_references(case, generation_prompt, released):
    encoded = encode(released, case)
    ids = encoded.input_ids.tolist()
    assert ids == case[f"input_ids_generation_prompt_{str(generation_prompt).lower()}"]
    if case.get("instruction"):
        start, end = ids.index(151658), ids.index(151659)
        assert encoded.pool_mask.tolist() == [not start <= i <= end for i in range(len(ids))]
    else:
        assert encoded.pool_mask.all()
