"""The `Embedder` that users import: shapes, order, inputs, devices, errors."""

from collections import UserDict, deque
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import umarvel_ray
from tests.support.rerankers import make_reranker, make_reranking_recipe
from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.model import device
from umarvel_ray.model.embedder import WINDOW, Embedder
from umarvel_ray.model.int8 import quantize
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.recipe import ModelSettings

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096)


@pytest.fixture(scope="module")
def embedder(tiny_base) -> Embedder:
    return Embedder.from_pretrained(tiny_base, settings=SETTINGS)


def test_the_package_exports_it():
    assert umarvel_ray.Embedder is Embedder


def test_a_vector_is_the_unit_mean_of_the_stock_models_states(family_base):
    """Against transformers' own forward, pixels, positions and DeepStack included, pooled here by hand."""
    embedder = Embedder.from_pretrained(family_base, settings=SETTINGS)
    item = {"image": Image.effect_noise((64, 64), 60).convert("RGB"), "text": "boats", "instruction": "find it"}
    encoded = ItemEncoder.from_pretrained(family_base, SETTINGS).encode(item, "query")
    ids = torch.from_numpy(encoded.input_ids).long()[None]
    core = embedder.model.backbone.model
    with torch.no_grad():
        states = core(
            input_ids=ids,
            pixel_values=embedder.model.scale([picture.pixels for picture in encoded.pictures]),
            image_grid_thw=torch.tensor([picture.grid for picture in encoded.pictures]),
            mm_token_type_ids=(ids == core.config.image_token_id).int(),
            attention_mask=torch.ones_like(ids),
        ).last_hidden_state[0]
    tokens = embedder.encoder.tokenizer.convert_ids_to_tokens(ids[0])
    start, end = tokens.index("<instruction_start>"), tokens.index("<instruction_end>")
    mean = torch.cat([states[:start], states[end + 1 :]]).mean(0)
    np.testing.assert_allclose(embedder.encode_query([item])[0], (mean / mean.norm()).numpy(), atol=1e-5)


def test_shapes_order_and_type(embedder):
    texts = [f"{'a red fox ' * (i % 7)}number {i}" for i in range(40)]
    vectors = embedder.encode_document(texts, token_budget=64)
    assert vectors.dtype == np.float32
    assert vectors.shape == (40, embedder.dimension)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for i in (0, 6, 39):
        np.testing.assert_allclose(embedder.encode_document([texts[i]])[0], vectors[i], atol=1e-5)


def test_more_items_than_a_window(embedder):
    vectors = embedder.encode_document([str(i % 5) for i in range(WINDOW + 3)])
    assert vectors.shape[0] == WINDOW + 3
    np.testing.assert_allclose(vectors, np.resize(vectors[:5], vectors.shape), atol=1e-5)


def test_truncated_vectors_are_the_first_coordinates_at_unit_norm(tiny_base, embedder):
    short = Embedder.from_pretrained(tiny_base, settings=SETTINGS, truncate_dim=5)
    items = ["a red fox", {"text": "boats", "image": Image.new("RGB", (64, 64), "red")}]
    first = embedder.encode_document(items)[:, :5]
    assert short.dimension == 5
    for encode in (short.encode_query, short.encode_document):
        np.testing.assert_allclose(encode(items), first / np.linalg.norm(first, axis=1, keepdims=True), atol=1e-6)
    assert short.encode_query([]).shape == (0, 5)


@pytest.mark.parametrize("dimension", [0, -1, 33])
def test_a_dimension_that_the_model_lacks_is_refused(tiny_base, dimension):
    with pytest.raises(UserError, match=f"truncate_dim is {dimension}; give 1 to 32"):
        Embedder.from_pretrained(tiny_base, settings=SETTINGS, truncate_dim=dimension)


def test_no_items_give_no_rows(embedder):
    assert embedder.encode_query([]).shape == embedder.encode([]).shape == (0, embedder.dimension)
    assert embedder.embed_encoded([]).shape == (0, embedder.dimension)


def test_a_string_is_a_text_and_without_an_instruction_both_sides_agree(embedder):
    np.testing.assert_array_equal(embedder.encode_query(["boats"]), embedder.encode_document([{"text": "boats"}]))


def test_the_instruction_matters_although_it_is_not_pooled(embedder):
    one, two = embedder.encode_query([{"text": "boats", "instruction": i} for i in ("find images", "find texts")])
    assert np.abs(one - two).max() > 1e-3


def test_similarity_is_the_cosine(embedder):
    a, b = embedder.encode_query(["boats", "fox"]), embedder.encode_document(["boats", "snow", "a"])
    scores = embedder.similarity(a, b)
    assert scores.shape == (2, 3)
    assert scores[0, 0] == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(scores, a @ b.T, atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(3 * a, torch.from_numpy(b)), scores, atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(a[0], b[1]), scores[:1, 1:2], atol=1e-6)


def test_one_item_gives_one_vector(embedder):
    for item in ("boats", {"text": "boats"}, {"image": Image.new("RGB", (64, 64), "red")}):
        for encode in (embedder.encode_query, embedder.encode_document, embedder.encode):
            vector = encode(item)
            assert vector.shape == (embedder.dimension,)
            np.testing.assert_array_equal(vector, encode([item])[0])


def test_a_prompt_is_the_instruction_of_every_item_without_one(embedder):
    items = ["boats", {"text": "a red fox"}, {"text": "snow", "instruction": "find texts"}]
    prompted = embedder.encode_query(items, prompt="find images")
    own = [{"text": "boats"}, *items[1:]]
    expected = embedder.encode_query([{"instruction": "find images"} | item for item in own])
    np.testing.assert_array_equal(prompted, expected)
    np.testing.assert_array_equal(prompted[2:], embedder.encode_query(items)[2:])
    assert np.abs(prompted - embedder.encode_query(items))[:2].max() > 1e-3
    np.testing.assert_array_equal(embedder.encode_query("boats", prompt="find images"), prompted[0])
    assert items == ["boats", {"text": "a red fox"}, {"text": "snow", "instruction": "find texts"}]


def test_encode_embeds_as_a_query(embedder):
    items = ["boats", {"text": "snow", "instruction": "find texts"}]
    np.testing.assert_array_equal(embedder.encode(items, "find it"), embedder.encode_query(items, "find it"))


def test_a_document_takes_no_prompt(embedder):
    with pytest.raises(UserError, match=r"^prompt: a document carries no instruction; put it on the query$"):
        embedder.encode_document(["boats"], prompt="find it")
    with pytest.raises(UserError, match="document 0: a document carries no instruction"):
        embedder.encode_document([{"text": "boats", "instruction": "find it"}])


def test_items_that_are_tokenized_already_give_the_same_vectors(embedder):
    items = ["boats", {"image": Image.new("RGB", (64, 64), "red"), "text": "a red fox"}]
    encoded = [embedder.encoder.encode(item, "document") for item in items]
    np.testing.assert_array_equal(embedder.embed_encoded(encoded), embedder.encode_document(items))


def test_a_bad_item_is_named_by_its_position(embedder):
    with pytest.raises(UserError, match=r"document 1: picture gone.png not found"):
        embedder.encode_document(["fine", {"image": "gone.png"}])
    with pytest.raises(UserError, match="query 1: an item must be a string or a dict, not int"):
        embedder.encode_query(["fine", 2], prompt="find it")


def test_a_base_needs_settings(tiny_base):
    with pytest.raises(UserError, match=r"umarvel.json: not found"):
        Embedder.from_pretrained(tiny_base)


def test_bfloat16_is_close(tiny_base, embedder):
    half = Embedder.from_pretrained(tiny_base, dtype="bfloat16", settings=SETTINGS)
    vectors = half.encode_query(["a red fox", "boats"])
    assert vectors.dtype == np.float32
    assert (vectors * embedder.encode_query(["a red fox", "boats"])).sum(1).min() > 0.99


def test_int8_is_close_smaller_and_as_independent_of_the_batch(tiny_base, embedder, tmp_path):
    small = Embedder.from_pretrained(tiny_base, dtype="int8", settings=SETTINGS)
    items = ["a red fox", {"image": Image.new("RGB", (64, 64), "red"), "text": "boats " * 20}, "b"]
    vectors = small.encode_document(items)
    assert 0.99 < (vectors * embedder.encode_document(items)).sum(1).min() < 1 - 1e-6
    alone = np.concatenate([small.encode_document([item]) for item in items])
    assert (vectors * alone).sum(1).min() > 0.9999  # a value between two levels may get the other one

    def size(one: Embedder) -> int:
        torch.save(one.model.backbone.model.language_model.layers.state_dict(), tmp_path / "layers")
        return (tmp_path / "layers").stat().st_size

    assert size(small) < 0.5 * size(embedder)


def test_int8_layers_take_the_place_of_linear_ones():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(40, 24)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(24, 40, generator=generator) / 10)
    inputs, expected = torch.randn(5, 40, generator=generator), linear.weight.detach().clone()
    model = nn.Sequential(linear)
    quantize(model)
    torch.testing.assert_close(model(inputs), inputs @ expected.T + linear.bias, rtol=0, atol=0.03)


@pytest.mark.parametrize("generation_prompt", [False, True])
def test_the_reference_preset_embeds_as_the_authors_code(family_base, generation_prompt):
    """The reference by hand (docs/method.md#item-template): conversation, sequential positions, no DeepStack, mean."""
    embedder = Embedder.from_pretrained(family_base, preset="reference", generation_prompt=generation_prompt)
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    message = "<instruction_start>Find it.<instruction_end> boats."
    run = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"
    text = f"<|im_start|>user\n{run}{message}<|im_end|>\n<|im_start|>assistant\n<emb>.<|im_end|>\n"
    text += "<|im_start|>assistant\n" if generation_prompt else ""
    tokenizer, core = embedder.encoder.tokenizer, embedder.model.backbone.model
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    opened = embedder.encoder.pictures({"image": picture}, "x")
    with torch.no_grad():
        features = core.visual(embedder.model.scale([opened[0].pixels]), grid_thw=torch.tensor([opened[0].grid]))
        embeds = core.get_input_embeddings()(ids)
        embeds[ids == core.config.image_token_id] = features.pooler_output
        states = core.language_model(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    tokens = tokenizer.convert_ids_to_tokens(ids[0])
    start, end = tokens.index("<instruction_start>"), tokens.index("<instruction_end>")
    mean = torch.cat([states[:start], states[end + 1 :]]).mean(0)
    ours = embedder.encode_query([{"image": picture, "text": "boats", "instruction": "find it"}])[0]
    np.testing.assert_allclose(ours, (mean / mean.norm()).numpy(), atol=1e-5)


def test_an_unknown_preset_is_refused(tiny_base):
    with pytest.raises(UserError, match="unknown preset 'refrence'"):
        Embedder.from_pretrained(tiny_base, preset="refrence")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_best_device_is_chosen(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device.best_device() == expected


def test_an_apple_gpu_must_run_the_model_and_agree_with_the_cpu():
    def lacking(on: str) -> np.ndarray:
        if on == "mps":
            raise NotImplementedError("The operator is not implemented for the MPS device")
        return np.ones(4)

    assert device.checked_device("mps", lambda on: np.ones(4)) == "mps"
    assert device.checked_device("mps", lacking) == "cpu"
    assert device.checked_device("mps", lambda on: np.full(4, 1.2 if on == "mps" else 1.0)) == "cpu"
    assert device.checked_device("mps", lambda on: np.full(4, np.nan if on == "mps" else 1.0)) == "cpu"
    assert device.checked_device("cuda", lacking) == "cuda"


def test_without_a_device_an_apple_gpu_that_cannot_run_the_model_is_passed_over(monkeypatch, tiny_base, embedder):
    """Here PyTorch has no MPS at all: moving the model there fails, as an unsupported operation would."""
    monkeypatch.setattr("umarvel_ray.model.embedder.best_device", lambda: "mps")
    fallback = Embedder.from_pretrained(tiny_base, settings=SETTINGS)
    assert fallback.device.type == "cpu"
    np.testing.assert_array_equal(fallback.encode_query(["boats"]), embedder.encode_query(["boats"]))


def test_a_named_device_is_taken_as_it_is(monkeypatch, tiny_base):
    monkeypatch.setattr("umarvel_ray.model.embedder.best_device", lambda: pytest.fail("nobody asked"))
    assert Embedder.from_pretrained(tiny_base, "cpu", settings=SETTINGS).device.type == "cpu"


def test_the_rows_of_a_series_come_in_its_order(embedder):
    texts = ["boats", "snow", "a fox"]
    shuffled = pd.Series(texts, index=[7, 0, 2])
    np.testing.assert_allclose(embedder.encode(shuffled), embedder.encode(texts), atol=1e-6)


def test_an_embedding_that_is_not_finite_is_an_error(tiny_base):
    broken = Embedder.from_pretrained(tiny_base, settings=SETTINGS)
    words = broken.model.backbone.get_input_embeddings().weight
    own, others = (set(broken.encoder.encode({"text": text}, "query").input_ids.tolist()) for text in ("snow", "boats"))
    with torch.no_grad():
        words[list(own - others)] = torch.nan
    assert np.isfinite(broken.encode(["boats"])).all()
    with pytest.raises(UserError, match=r"item 1: its embedding is not finite; open the checkpoint in float32"):
        broken.encode(["boats", "snow"])


def test_a_rerankers_checkpoint_is_no_embedder(tiny_base, tmp_path):
    folder = make_reranker(tiny_base, make_reranking_recipe(), tmp_path / "reranker").path
    with pytest.raises(UserError, match=r"is a reranker's checkpoint; open it with Reranker.from_pretrained"):
        Embedder.from_pretrained(folder)


class Columns(UserDict):
    """A dict-like object, such as a tokenizer's output."""


NO_LISTS = [
    pd.DataFrame({"text": ["a", "b"]}),
    pd.DataFrame({"text": ["a"]}).T,
    Columns(text="a"),
    {"a", "b"},
    {"text": "a"}.keys(),
    None,
    7,
    1.5,
    True,
    b"abc",
    Path("a.png"),
    Image.new("RGB", (8, 8)),
    np.array("a"),
]


@pytest.mark.parametrize("items", NO_LISTS, ids=lambda items: type(items).__name__)
def test_what_is_no_list_of_items_is_one_line(embedder, items):
    for encode in (embedder.encode, embedder.encode_query, embedder.encode_document):
        with pytest.raises(
            UserError, match=f"{type(items).__name__} is no list of items; give a text, a dict"
        ) as error:
            encode(items)
        assert "\n" not in str(error.value)


def test_anything_that_gives_items_in_order_is_a_list_of_items(embedder):
    expected = embedder.encode(["a fox", "two boats"])
    texts = ["a fox", "two boats"]
    for items in (tuple(texts), iter(texts), (text for text in texts), np.array(texts), pd.Series(texts, index=[7, 3]),
                  {1: "a fox", 2: "two boats"}.values(), deque(texts)):  # fmt: skip
        np.testing.assert_array_equal(embedder.encode(items), expected)


def test_an_empty_picture_is_none(embedder):
    for empty in (b"", bytearray(), "", []):
        np.testing.assert_array_equal(embedder.encode({"text": "a", "image": empty}), embedder.encode("a"))
        with pytest.raises(UserError, match="nothing to embed"):
            embedder.encode({"image": empty})


def test_an_instruction_that_leaves_no_room_for_the_text_is_refused(embedder):
    long = "find it " * 300
    with pytest.raises(UserError, match=r"query 0: the instruction leaves no room .* max_text_tokens \(480\); shorten"):
        embedder.encode_query(["a fox"], prompt=long)
    with pytest.raises(UserError, match="leaves no room"):
        embedder.encode_query({"text": "a fox", "instruction": long})
    picture = {"image": Image.new("RGB", (64, 64)), "instruction": long}
    assert embedder.encode_query(picture).shape == (embedder.dimension,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "foo"}, "device 'foo': not known to PyTorch"),
        ({"device": 1.5}, "device 1.5: not known"),
        ({"dtype": "float99"}, "dtype 'float99': give 'float32'"),
        ({"dtype": None}, "dtype None: give"),
        ({"dtype": "int32"}, "dtype 'int32': give"),
        ({"truncate_dim": "8"}, "truncate_dim is '8'; give 1 to"),
        ({"truncate_dim": 8.0}, "truncate_dim is 8.0; give 1 to"),
        ({"truncate_dim": True}, "truncate_dim is True; give 1 to"),
    ],
)
def test_a_wrong_way_to_load_is_one_line(changes, message, tiny_base):
    with pytest.raises(UserError, match=message):
        Embedder.from_pretrained(tiny_base, settings=SETTINGS, **changes)


def test_a_prompt_must_be_text(embedder):
    with pytest.raises(UserError, match="prompt: must be text, not int"):
        embedder.encode_query(["a"], prompt=3)


def test_documents_to_rerank_must_be_a_list(tiny_base, tmp_path):
    reranker = Reranker.from_pretrained(make_reranker(tiny_base, make_reranking_recipe(), tmp_path / "reranker").path)
    for documents in NO_LISTS:
        for score in (reranker.score, reranker.rank):
            with pytest.raises(UserError, match=r"documents: .* is no list of items"):
                score("a", documents)
    ranked = reranker.rank("a", (text for text in ["b", "c"]), return_documents=True)
    assert {row["text"] for row in ranked} == {"b", "c"}
