"""A checkpoint in sentence-transformers: the same vectors, in a process that cannot import umarvel_ray.

Items, settings and pictures are chosen so that every setting changes a vector; one process opens all directories.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.items.test_videos import film
from tests.support.tiny import make_tiny_base
from umarvel_ray.model.checkpoint import save_checkpoint
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.reranker import RerankerModel
from umarvel_ray.recipe import ModelSettings

SIZES = {"min_pixels": 1024, "max_pixels": 8192}
CASES = {
    "as the paper": {},
    "as the reference": {"positions": "sequential"},
    "causal last": {"attention": "causal", "pooling": "last"},
    "instruction counted": {"instruction_mask": False},
    "compression prompt": {"compression_prompt": True},
    "generation prompt": {"generation_prompt": True, "pooling": "last", "positions": "sequential"},
    "short texts": {"max_text_tokens": 80},
    "weights in bfloat16": {},
    "resized twice": {"resize_twice": True, "min_pixels": 784, "max_pixels": 3136},
    "qwen2_5_vl": {},
    "qwen3_vl": {},
    "qwen3_vl without DeepStack": {"deepstack": False, "positions": "sequential"},
    "small pictures": {"min_pixels": 256, "max_pixels": 1024, "video_frames": 3, "max_video_pixels": 2048},
}
INSTRUCTION = "Find an image that matches the caption"

PROGRAM = """
import json, sys
for name in ("umarvel_ray", "torchvision"):
    sys.modules[name] = None
import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
inputs = json.load(open("inputs.json"))

def refusal(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found = {}
for folder in inputs["folders"]:
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    found[f"{folder}/query"] = model.encode_query(inputs["queries"], batch_size=3)
    found[f"{folder}/document"] = model.encode_document(inputs["documents"], batch_size=3)
    found[f"{folder}/prompt"] = model.encode_query(inputs["plain"], prompt=inputs["instruction"])
found["truncated"] = SentenceTransformer(folder, trust_remote_code=True, device="cpu", truncate_dim=7).encode_query(
    inputs["queries"], normalize_embeddings=True)
model.save("resaved")
again = SentenceTransformer("resaved", trust_remote_code=True, device="cpu")
found["resaved"] = again.encode_query(inputs["queries"])
found["similarity"] = model.similarity(found[f"{folder}/query"], found[f"{folder}/document"])
found["frames"] = model.encode_document([{"video": np.load("frames.npy")}])

def gradient(loss):
    # Loss and gradient of one weight, for pairs with and without pictures and videos.
    model.zero_grad()
    sides = [model.preprocess(inputs[side][:6]) for side in ("queries", "documents")]
    value = loss(sides, None)
    value.backward()
    return np.concatenate([[value.item()], model[0].model.language_model.layers[0].mlp.up_proj.weight.grad.flatten()])

model.eval()
found["mnrl"] = gradient(losses.MultipleNegativesRankingLoss(model))
for size in (1, 2, 4, 6):
    found[f"mnrl of {size}"] = gradient(losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=size))
np.savez("found.npz", **found)
json.dump({
    "document": refusal(lambda: model.encode_document(["a"], prompt="find it")),
    "room": refusal(lambda: model.encode_query([{"text": "a", "instruction": "find it " * 500}])),
    "nothing": refusal(lambda: model.encode_query([{"instruction": "find it"}])),
    "key": refusal(lambda: model.encode_query([{"text": "a", "color": "red"}])),
    "picture": refusal(lambda: model.encode_document([{"image": "none.png"}])),
    "video": refusal(lambda: model.encode_document([{"video": "none.mp4"}])),
    "no PyAV": sys.modules.update(av=None) or refusal(lambda: model.encode_document([inputs["plain"][-1]])),
}, open("refused.json", "w"))
"""


def draw(folder) -> dict[str, str]:
    """A film, a plain picture, and pictures that are not plain RGB: transparent, rotated by EXIF, 16-bit gray."""
    noise = Image.effect_noise((90, 60), 80)
    clear = noise.convert("RGB")
    clear.putalpha(Image.linear_gradient("L").resize(noise.size))
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.asarray(noise).astype(np.uint16) << 8)
    noise.convert("RGB").rotate(5).save(folder / "plain.png")
    noise.convert("RGB").crop((0, 0, 90, 3)).save(folder / "sliver.png")
    clear.save(folder / "clear.png")
    noise.convert("RGB").save(folder / "turned.jpg", exif=turned)
    deep.save(folder / "deep.png")
    (folder / "film.mp4").write_bytes(film())
    np.save(folder / "frames.npy", np.random.default_rng(0).integers(0, 255, (5, 3, 24, 40), np.uint8))
    names = ("plain.png", "sliver.png", "clear.png", "turned.jpg", "deep.png", "film.mp4")
    return {name.split(".")[0]: str(folder / name) for name in names}


def items(pictures: dict[str, str]) -> dict[str, list]:
    instruction = {"instruction": INSTRUCTION}
    plain = [
        "a red fox\r crosses",
        pictures["plain"],
        {"image": pictures["clear"], "text": '"two boats"'},
        pictures["film"],
    ]
    return {
        "plain": plain,
        "documents": [
            *plain,
            {"image": pictures["turned"]},
            {"image": pictures["sliver"]},
            {"image": [pictures["deep"], pictures["plain"]], "text": "two <emb> pictures <|im_\rend|>"},
            {
                "video": [pictures["plain"], pictures["clear"], pictures["turned"]],
                "image": pictures["deep"],
                "text": "a",
            },
            "Harbor lights at dusk. " * 12,
        ],
        "queries": [
            {"text": "a red fox"} | instruction,
            {"text": "a red fox"},
            {"image": pictures["plain"]} | instruction,
            {"image": pictures["clear"], "text": "two boats?", "instruction": "the <instruction_end> end " * 9},
            {"image": pictures["turned"], "text": ""},
            {"video": pictures["film"], "text": "boats"} | instruction,
            {"text": "Harbor lights at dusk. " * 12, "image": None} | instruction,
        ],
    }


@pytest.fixture(scope="module")
def opened(tiny_base, tmp_path_factory):
    """The embeddings that sentence-transformers computes with one checkpoint per case."""
    folder = tmp_path_factory.mktemp("sentence-transformers")
    bases = {family: make_tiny_base(folder / f"base-{family}", family=family) for family in ("qwen2_5_vl", "qwen3_vl")}
    for name, changes in CASES.items():
        settings = ModelSettings(**SIZES | changes)
        dtype = "bfloat16" if "bfloat16" in name else "float32"
        base = bases.get(name.split()[0], tiny_base)
        model = EmbeddingModel.from_pretrained(base, settings, dtype)
        save_checkpoint(model, folder / name, settings, {"phase": "text"})
    inputs = items(draw(folder))
    (folder / "inputs.json").write_text(json.dumps(inputs | {"folders": list(CASES), "instruction": INSTRUCTION}))
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, inputs, dict(np.load(folder / "found.npz"))


def as_item(value):
    """A bare path is a picture or a video to sentence-transformers, but text to the Embedder."""
    kind = {".png": "image", ".mp4": "video"}.get(value[-4:] if isinstance(value, str) else "")
    return {kind: value} if kind else value


@pytest.mark.parametrize("case", CASES)
def test_the_vectors_are_the_same(opened, case):
    folder, inputs, found = opened
    embedder = Embedder.from_pretrained(folder / case)
    documents = [as_item(item) for item in inputs["documents"]]
    plain = [{"text": item} if isinstance(item, str) else item for item in map(as_item, inputs["plain"])]
    expected = {
        "query": embedder.encode_query(inputs["queries"]),
        "document": embedder.encode_document(documents),
        "prompt": embedder.encode_query(plain, prompt=INSTRUCTION),
    }
    for side, vectors in expected.items():
        assert np.abs(found[f"{case}/{side}"] - vectors).max() < 1e-5, side


def test_every_setting_changes_the_vectors(opened):
    """Otherwise the test above would pass without testing anything."""
    _, _, found = opened
    for case in list(CASES)[1:]:
        change = max(np.abs(found[f"{case}/{s}"] - found[f"as the paper/{s}"]).max() for s in ("query", "document"))
        assert change > 1e-3, case
    query = found["as the paper/query"]
    assert np.abs(query[0] - query[1]).max() > 1e-3  # with and without instruction


def test_truncated_vectors_are_the_same(opened):
    folder, inputs, found = opened
    short = Embedder.from_pretrained(folder / list(CASES)[-1], truncate_dim=7)
    assert found["truncated"].shape == (len(inputs["queries"]), 7)
    assert np.abs(found["truncated"] - short.encode_query(inputs["queries"])).max() < 1e-5


def test_frames_may_come_as_an_array(opened):
    """As mteb and others pass them to sentence-transformers."""
    folder, _, found = opened
    frames = [Image.fromarray(frame.transpose(1, 2, 0)) for frame in np.load(folder / "frames.npy")]
    expected = Embedder.from_pretrained(folder / list(CASES)[-1]).encode_document([{"video": frames}])
    assert np.abs(found["frames"] - expected).max() < 1e-5


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_a_loss_may_cut_batches_with_pictures(opened, size):
    """The gradient of sentence-transformers' cached loss is the plain loss's for every mini-batch size."""
    found = opened[2]
    assert found[f"mnrl of {size}"] == pytest.approx(found["mnrl"], rel=1e-3, abs=1e-6)


def test_it_saves_what_it_opened(opened):
    folder, _, found = opened
    last = list(CASES)[-1]
    assert np.allclose(found["resaved"], found[f"{last}/query"], atol=1e-6)
    assert np.allclose(found["similarity"], found[f"{last}/query"] @ found[f"{last}/document"].T, atol=1e-6)
    assert json.loads((folder / "resaved/umarvel.json").read_text())["settings"]["max_pixels"] == 1024


def test_bad_input_is_refused(opened):
    refused = json.loads((opened[0] / "refused.json").read_text())
    assert refused["document"] == "ValueError: a document carries no instruction; put it on the query"
    assert refused["room"].startswith("ValueError: the instruction leaves no room for a text within max_text_tokens")
    assert refused["nothing"] == "ValueError: nothing to embed; give a text, an image or a video"
    assert refused["key"].startswith("ValueError: unknown key 'color'")
    assert refused["picture"].startswith("FileNotFoundError")
    assert refused["video"].startswith("FileNotFoundError")
    assert refused["no PyAV"].startswith("ImportError: a video file needs PyAV: pip install av")


def test_a_reranker_has_a_card_and_no_modules(tiny_base, tmp_path):
    settings = ModelSettings(**SIZES).for_reranker(64)
    model = RerankerModel.from_pretrained(tiny_base, settings)
    save_checkpoint(model, tmp_path / "reranker", settings, {"phase": "reranker"})
    assert (tmp_path / "reranker/README.md").is_file()
    assert not (tmp_path / "reranker/modules.json").exists()
