"""The shape of a base model, from its config.json alone: the basis for counting parameters, memory and FLOPs.

The counts follow the layers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL in transformers, and the tests compare them with
models built there. Nothing here imports torch, so that a dry run is instant.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from umarvel_ray.errors import UserError
from umarvel_ray.runs import base_folder

PUBLISHED = Path(__file__).with_name("shapes.yaml")

# Defaults of transformers' configuration classes, for keys that a config.json omits, as the published ones often do.
COMMON = {"in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_heads": 16}
VISION = {
    "qwen2_vl": COMMON | {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "patch_size": 14},
    "qwen2_5_vl": COMMON
    | {"depth": 32, "intermediate_size": 3420, "patch_size": 14, "window_size": 112}
    | {"fullatt_block_indexes": [7, 15, 23, 31]},
    "qwen3_vl": COMMON
    | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16}
    | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]},
}


@dataclass(frozen=True)
class TextShape:
    """The language model.

    Attributes:
        head: dimension of an attention head.
        tied: the token embeddings are also the language-model head.
        biased: the query, key and value projections have biases.
        normed: queries and keys are normalized.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head: int
    tied: bool
    biased: bool
    normed: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's matrices, which are also the LoRA targets: q, k, v, o, gate, up, down."""
        wide, narrow = self.heads * self.head, self.key_heads * self.head
        attention = [(self.hidden, wide), (self.hidden, narrow), (self.hidden, narrow), (wide, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def matrices(self) -> int:
        """Weights in the matrices of all layers."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def tables(self) -> int:
        """Weights of the token embeddings and the language-model head; one table if they are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        biases = self.biased * (self.heads + 2 * self.key_heads) * self.head
        norms = 2 * self.hidden + self.normed * 2 * self.head
        return self.tables + self.matrices + self.layers * (biases + norms) + self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Parameters of adapters on all matrices: rank × (in + out) each (LoRA, arXiv 2106.09685, section 4)."""
        return self.layers * sum(rank * (i + o) for i, o in self.linears)


@dataclass(frozen=True)
class VisionShape:
    """The vision tower and its merger.

    Attributes:
        form: the model type; the three families differ in norms, gates and biases.
        values: numbers in a patch: channels × frames × patch².
        out: dimension of the merged tokens.
        positions: learned position embeddings.
        deepstack: number of DeepStack mergers.
        window: side of an attention window in patches; 0 without windowed attention.
        whole: number of blocks with attention over the whole picture.
    """

    form: str
    depth: int
    width: int
    intermediate: int
    patch: int
    merge: int
    values: int
    out: int
    positions: int
    deepstack: int
    window: int
    whole: int

    @property
    def block(self) -> int:
        """Weights in the matrices of one block, without biases and norms."""
        return 4 * self.width**2 + (3 if self.form == "qwen2_5_vl" else 2) * self.width * self.intermediate

    @property
    def mergers(self) -> int:
        """Weights of the matrices that merge merge² patches into a token, including DeepStack's."""
        wide = self.width * self.merge**2
        return (1 + self.deepstack) * (wide * wide + wide * self.out)

    @property
    def norm(self) -> int:
        """Parameters of a norm per channel: a scale for RMSNorm, a scale and a shift for LayerNorm."""
        return 1 if self.form == "qwen2_5_vl" else 2

    @property
    def projector(self) -> int:
        """Parameters of the mergers, including biases and norms."""
        wide = self.width * self.merge**2
        biases = (1 + self.deepstack) * (wide + self.out)
        return self.mergers + biases + self.norm * (self.width + self.deepstack * wide)

    @property
    def parameters(self) -> int:
        gated, qwen3 = self.form == "qwen2_5_vl", self.form == "qwen3_vl"
        biases = 4 * self.width + (2 if gated else 1) * self.intermediate + self.width
        blocks = self.depth * (self.block + biases + self.norm * 2 * self.width)
        patches = self.values * self.width + qwen3 * self.width + self.positions * self.width
        return patches + blocks + self.projector

    def tokens(self, pixels: int) -> int:
        """Merged tokens of a picture with this number of pixels."""
        return max(1, pixels // (self.patch * self.merge) ** 2)


@dataclass(frozen=True)
class Shape:
    """A base model: language model and vision tower."""

    text: TextShape
    vision: VisionShape

    @property
    def parameters(self) -> int:
        return self.text.parameters + self.vision.parameters


def read_shape(base: str) -> Shape:
    """The shape of a recipe's `base`, from the config.json in its directory or from `shapes.yaml`.

    Raises:
        UserError: neither exists, the file cannot be read, or the model type is not supported.
    """
    file = base_folder(base) / "config.json"
    published = yaml.safe_load(PUBLISHED.read_text())
    if file.is_file():
        try:
            return shape_of(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{file}: not the configuration of a supported Qwen-VL model ({error!r}); copy it again"
            ) from None
    if base in published:
        return shape_of(published[base])
    raise UserError(f"base {base}: no directory with a config.json; set base=DIR, or one of {', '.join(published)}")


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape described by the content of a config.json; older files have the text model's keys at the top level.

    Raises:
        KeyError: a missing key, or an unsupported model type.
    """
    form = config["model_type"]
    if form not in VISION:
        raise KeyError(f"model_type {form}; supported: {', '.join(VISION)}")
    text = config.get("text_config") or config
    vision = VISION[form] | config["vision_config"]
    first, qwen3 = form == "qwen2_vl", form == "qwen3_vl"
    width = vision["embed_dim" if first else "hidden_size"]
    windowed = form == "qwen2_5_vl"
    return Shape(
        TextShape(
            vocabulary=text["vocab_size"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            key_heads=text["num_key_value_heads"],
            head=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            biased=not qwen3,
            normed=qwen3,
        ),
        VisionShape(
            form=form,
            depth=vision["depth"],
            width=width,
            intermediate=int(width * vision["mlp_ratio"]) if first else vision["intermediate_size"],
            patch=vision["patch_size"],
            merge=vision["spatial_merge_size"],
            values=vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            out=text["hidden_size"],
            positions=vision["num_position_embeddings"] if qwen3 else 0,
            deepstack=len(vision["deepstack_visual_indexes"]) if qwen3 else 0,
            window=vision["window_size"] // vision["patch_size"] if windowed else 0,
            whole=len(vision["fullatt_block_indexes"]) if windowed else vision["depth"],
        ),
    )
