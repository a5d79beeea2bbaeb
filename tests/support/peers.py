"""Golden data of other published systems: their inputs, and their tiny models rebuilt from `models.json`."""

import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from umarvel_ray.recipe import ModelSettings

STEM = {"d_two_images": {"side": "document", "text": "Two pictures of one thing", "image": ["p1", "p6"]}}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def picture(spec: dict) -> Image.Image:
    """A picture of blocks of 28 × 28 pixels, cut to its size."""
    rows, columns = math.ceil(spec["height"] / 28), math.ceil(spec["width"] / 28)
    blocks = np.random.default_rng(spec["seed"]).integers(0, 255, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((28, 28, 1), np.uint8))[: spec["height"], : spec["width"]])


def item(inputs: dict, name: str) -> tuple[dict, str]:
    """An item of `inputs.json` and its side; what follows a "+" in its name is a variant of the system."""
    found = dict((inputs["items"] | STEM)[name.split("+")[0]])
    side = found.pop("side")
    if shown := found.get("image"):
        drawn = [picture(inputs["pictures"][one]) for one in (shown if isinstance(shown, list) else [shown])]
        found["image"] = drawn if isinstance(shown, list) else drawn[0]
    return found, side


def ids(stored: list) -> list[int]:
    """Token ids, of which [id, n] stands for n times that id."""
    return [one for part in stored for one in ([part[0]] * part[1] if isinstance(part, list) else [part])]


def weight(model: str, name: str, shape: list[int]) -> torch.Tensor:
    """A tensor of a tiny model, as the golden data's README defines it."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if name.endswith("weight") and ("norm" in name or "ln_q" in name):
        return 1 + 0.1 * drawn
    if "embed_tokens" in name:
        return (0.2 if model == "qwen3vl" else 0.5) * drawn
    if "pos_embed" in name:
        return 0.5 * drawn
    return drawn * (1.5 / math.sqrt(shape[-1]) if len(shape) == 2 else 0.05)


def make_model(folder: Path, models: dict, name: str, tokenizer: Path) -> Path:
    """The tiny model `name` as a directory, with the files of a tokenizer's directory."""
    spec = models[name]
    folder.mkdir(parents=True)
    tensors = {}
    for key, (shape, total, first) in spec["tensors"].items():
        value = weight(name, key, shape)
        assert math.isclose(value.double().sum().item(), total, rel_tol=1e-3, abs_tol=1e-2), key
        assert math.isclose(value.flatten()[0].item(), first, rel_tol=1e-4), key
        tensors[key] = value.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(spec["config"]))
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    (folder / "preprocessor_config.json").write_text(json.dumps(spec["preprocessor_config"]))
    if "chat_template" in spec:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": spec["chat_template"]}))
    return folder


def variant(inputs: dict, name: str, settings: ModelSettings) -> tuple[dict, str, ModelSettings]:
    """An item of a system's golden data by name, its side, and the settings that its variant needs."""
    message, preparation = settings.message, settings.preparation
    stem, _, kind = name.partition("+")
    if name == "z_text":  # LamRA's zero-shot sets have no instructions
        return {"text": inputs["items"]["q_text"]["text"]}, "query", settings
    if name == "z_image":
        return item(inputs, "d_image")[0], "document", settings
    if name == "demo_image":
        text = {"text": "Find an image caption describing the given image."}
        return item(inputs, "d_odd")[0] | text, "query", settings
    if name == "d_image_bare":
        bare = message.model_copy(update={"picture_document": ""})
        return *item(inputs, "d_image"), settings.model_copy(update={"message": bare})
    found, side = item(inputs, stem)
    match kind:
        case "newline" if "text" in found:
            found["text"] += "\n"
        case "newline":
            found["instruction"] = f"{message.picture_document}\n"
        case "1344":
            preparation = preparation.model_copy(update={"square": 1344})
        case "native":
            preparation = preparation.model_copy(update={"square": None})
        case "256-1280":
            budget = {"min_pixels": 256 * 28 * 28, "max_pixels": 1280 * 28 * 28}
            preparation = preparation.model_copy(update={"own_budget": False})
            return found, side, settings.model_copy(update=budget | {"preparation": preparation})
        case "max_length=64":
            message = message.model_copy(update={"max_query_tokens": 64, "max_document_tokens": 64})
    return found, side, settings.model_copy(update={"message": message, "preparation": preparation})


def shorter(settings: ModelSettings) -> ModelSettings:
    """A reranker's settings with the limit of the golden data's `+max_length=120`."""
    return settings.model_copy(update={"pair": settings.pair.model_copy(update={"max_tokens": 120})})
