"""Checkpoints: complete or absent, self-describing, and readable by transformers alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from tests.support.with_torchvision import run_with_torchvision
from umarvel_ray.errors import UserError
from umarvel_ray.model import checkpoint
from umarvel_ray.model.checkpoint import CheckpointRef, load_settings, read_provenance, save_checkpoint
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.lora import add_lora
from umarvel_ray.recipe import Lora, ModelSettings

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=16384, pooling="last", positions="sequential")
PROVENANCE = {
    "temperature": 0.04,
    "phase": "text",
    "parent": "base",
    "recipe": {"name": "demo"},
    "data": {"train": 3},
    "metrics": {"loss": 1.5},
}
ITEMS = [
    {"text": "a red fox", "instruction": "find it"},
    {"image": Image.effect_noise((100, 60), 50).convert("RGB")},
]


@pytest.fixture(scope="module")
def model(tiny_base) -> EmbeddingModel:
    return EmbeddingModel.from_pretrained(tiny_base, SETTINGS)


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "checkpoints" / "text"
    save_checkpoint(model, path, SETTINGS, PROVENANCE)
    return path


def test_a_saved_model_gives_the_same_embeddings(tiny_base, saved):
    before = Embedder.from_pretrained(tiny_base, settings=SETTINGS)
    after = Embedder.from_pretrained(saved)
    assert after.encoder.settings == SETTINGS
    assert np.array_equal(after.encode_query(ITEMS), before.encode_query(ITEMS))


def test_a_checkpoint_can_be_loaded_and_saved_again(saved, tmp_path):
    first = Embedder.from_pretrained(saved)
    save_checkpoint(first.model, tmp_path / "next", SETTINGS, PROVENANCE)
    assert np.array_equal(Embedder.from_pretrained(tmp_path / "next").encode_query(ITEMS), first.encode_query(ITEMS))


def test_it_states_its_provenance(saved):
    record = read_provenance(saved)
    versions = record.pop("versions")
    assert versions.keys() >= {"torch", "transformers", "ray", "peft", "umarvel_ray", "python"}
    assert versions["torch"] == torch.__version__.partition("+")[0] or versions["torch"] == torch.__version__
    assert record == {"settings": SETTINGS.model_dump(mode="json"), **PROVENANCE}
    assert load_settings(saved) == SETTINGS


def test_transformers_alone_can_read_it(model, saved):
    stock, report = Qwen2VLForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.config.text_config.is_causal is False
    ids = torch.tensor([[40, 41, 42]])
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(input_ids=ids).logits, model.backbone.eval()(input_ids=ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.convert_tokens_to_ids("<emb>") == model.backbone.config.text_config.vocab_size - 3
    assert tokenizer.chat_template
    processor = json.loads((saved / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "Qwen2VLImageProcessor"
    assert processor["size"] == {"shortest_edge": 4096, "longest_edge": 16384}
    assert processor["patch_size"] == 8


def test_auto_processor_can_open_it(saved):
    """sentence-transformers also prepares pictures as before if torchvision would be the default."""
    run_with_torchvision(f"""
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoProcessor
from umarvel_ray import Embedder
path, picture = {str(saved)!r}, Image.effect_noise((100, 60), 50).convert("RGB")
processor = AutoProcessor.from_pretrained(path)
content = [{{"type": "image", "image": picture}}, {{"type": "text", "text": "what?"}}]
batch = processor.apply_chat_template(
    [{{"role": "user", "content": content}}], tokenize=True, return_dict=True, return_tensors="pt"
)
assert batch["image_grid_thw"].tolist() == [[1, 8, 12]]
assert (batch["input_ids"] == processor.image_token_id).sum() == 24
model = SentenceTransformer(path, trust_remote_code=True, device="cpu")
expected = Embedder.from_pretrained(path).encode_document([{{"image": picture}}])
assert np.abs(model.encode_document([picture]) - expected).max() < 1e-5
""")


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_partly_written_checkpoint_is_never_visible(model, saved, monkeypatch):
    """The write fails at its last file: the old checkpoint remains, and the next write succeeds."""
    before = contents(saved)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_versions", full)
        with pytest.raises(UserError, match=r"text: checkpoint cannot be written \(No space left on device\)"):
            save_checkpoint(model, saved, SETTINGS, {"phase": "again"})
    assert contents(saved) == before
    save_checkpoint(model, saved, SETTINGS, {"phase": "again"})
    assert read_provenance(saved)["phase"] == "again"
    assert [path.name for path in saved.parent.iterdir()] == ["text"]


def test_an_unwritable_path_is_a_one_line_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as error:
        save_checkpoint(model, tmp_path / "file" / "text", SETTINGS, {})
    assert "\n" not in str(error.value)


def test_unmerged_adapters_are_refused(tiny_base, tmp_path):
    model = EmbeddingModel.from_pretrained(tiny_base, SETTINGS)
    add_lora(model, Lora(r=2, alpha=2, dropout=0.0), seed=0)
    with pytest.raises(ValueError, match="merge"):
        save_checkpoint(model, tmp_path / "text", SETTINGS, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"umarvel.json: not found"),
        ('{"settings": {', r"umarvel.json: cannot be read"),
        ("{}", r"umarvel.json: no valid 'settings'"),
        ('{"settings": {"pooling": "max"}}', r"umarvel.json: no valid 'settings'"),
        ("[]", r"umarvel.json: no valid 'settings'"),
    ],
)
def test_a_damaged_record_is_named(saved, text, message):
    file = saved / "umarvel.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Embedder.from_pretrained(saved)
    assert "\n" not in str(error.value)


def test_truncated_weights_are_named(saved):
    file = saved / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    with pytest.raises(UserError, match=r"model.safetensors: truncated or damaged"):
        Embedder.from_pretrained(saved)


def test_a_deleted_parent_is_a_one_line_error(tiny_base, tmp_path):
    parent = shutil.copytree(tiny_base, tmp_path / "parent")
    model = EmbeddingModel.from_pretrained(parent, SETTINGS)
    shutil.rmtree(parent)
    with pytest.raises(UserError, match="cannot be written") as error:
        save_checkpoint(model, tmp_path / "text", SETTINGS, {})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"],
)
def test_its_identity_depends_on_every_file_that_changes_a_vector(saved, name):
    before = CheckpointRef.of(saved).identity
    (saved / name).write_text((saved / name).read_text() + " ")
    assert CheckpointRef.of(saved).identity != before


def test_its_identity_does_not_depend_on_its_place_or_its_record(saved, tmp_path):
    before = CheckpointRef.of(saved).identity
    (saved / "README.md").write_text("moved")
    record = json.loads((saved / "umarvel.json").read_text())
    (saved / "umarvel.json").write_text(json.dumps(record | {"parent": "another"}))
    assert CheckpointRef.of(saved.rename(tmp_path / "moved")).identity == before
