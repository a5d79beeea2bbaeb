"""A Qwen2-VL of realistic cost per token, with random weights, and the demo base's tokenizer and processor.

The demo base itself is so small that calling its layers costs more than their arithmetic.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from umarvel_ray.demo import BASE
from umarvel_ray.items.template import EMB
from umarvel_ray.recipe import ModelSettings

SETTINGS = ModelSettings(min_pixels=4 * 16 * 16, max_pixels=100 * 16 * 16)
TEXT_MODEL = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6, "num_attention_heads": 6,
              "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.05}  # fmt: skip
VISION_MODEL = {"hidden_size": 384, "embed_dim": 192, "depth": 4, "num_heads": 3}
SHAPE = (
    f"Qwen2-VL, random weights, fp32: language model {TEXT_MODEL['num_hidden_layers']} × {TEXT_MODEL['hidden_size']} "
    f"(MLP {TEXT_MODEL['intermediate_size']}), vision tower {VISION_MODEL['depth']} × {VISION_MODEL['embed_dim']}; "
    "a picture is up to 100 tokens"
)


def make_model(
    folder: Path,
    text: dict[str, Any] = TEXT_MODEL,
    vision: dict[str, Any] = VISION_MODEL,
    dtype: str = "float32",
) -> Path:
    """Write a Hugging Face directory; the weights are the same at every call."""
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((BASE / "config.json").read_text())
    config["text_config"] |= text | {"is_causal": False, "layer_types": None}
    config["vision_config"] |= vision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config | {"dtype": dtype})).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    size = {"shortest_edge": SETTINGS.min_pixels, "longest_edge": SETTINGS.max_pixels}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps(json.loads((BASE / name).read_text()) | {"size": size}))
    return folder


def make_peer_model(folder: Path) -> Path:
    """The same weights for other libraries, with a chat template that ends an item as ours does: the tokens match."""
    make_model(folder)
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + f"{{{{ '<|im_start|>assistant\\n{EMB}.<|im_end|>\\n' }}}}")
    return folder
