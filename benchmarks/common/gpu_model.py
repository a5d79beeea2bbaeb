"""What the GPU benchmark runs on: a published shape with random weights, random items, batching modes and FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.common.timing import measure
from umarvel_ray.estimate.flops import text_backward, text_forward, vision_forward
from umarvel_ray.estimate.shape import PUBLISHED, Shape, shape_of
from umarvel_ray.items.encoder import EncodedItem
from umarvel_ray.items.pictures import Picture, PixelScale
from umarvel_ray.items.positions import Span, rotary_positions
from umarvel_ray.model.batch import ItemBatch, collate, token_buckets
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.packing import use_packed_attention
from umarvel_ray.recipe import ModelSettings

SIZES = {"2b": "Qwen/Qwen2-VL-2B-Instruct", "7b": "Qwen/Qwen2-VL-7B-Instruct"}
TINY = {
    "model_type": "qwen2_vl",
    "tie_word_embeddings": True,
    "text_config": {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2},
    "vision_config": {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "hidden_size": 64},
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e6}
TOKENS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}
FIRST_TEXT_TOKEN = 20  # lower ids are special
PATCH, MERGE = 14, 2
PICTURE_TOKENS = (12, 22, 300)  # rows from, rows below, tokens about: Qwen2-VL's at the recipes' max_pixels
TEMPLATE_TOKENS = 24
QUERY, DOCUMENT = (0.76, 40), (0.53, 75)  # share with a picture, median text tokens: M-BEIR's training union
SPREAD = 0.8  # standard deviation of the logarithm of a text's length
MAX_TEXT = 480
PIXELS = np.random.default_rng(0)


def config_of(size: str) -> dict[str, Any]:
    """The content of a config.json.

    Args:
        size: "2b", "7b" or "tiny".
    """
    return TINY if size == "tiny" else yaml.safe_load(PUBLISHED.read_text())[SIZES[size]]


def rope_of(text: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters for a text_config; time, rows and columns get shares as in Qwen2-VL (16, 24 and 24 of 64)."""
    head = text["hidden_size"] // text["num_attention_heads"]
    return MROPE | {"mrope_section": [head // 8, head // 2 - head // 8 - 3 * head // 16, 3 * head // 16]}


def make_model(config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> EmbeddingModel:
    """Bidirectional, mean-pooled; random weights, drawn on the device."""
    text = config["text_config"]
    hf_config = AutoConfig.for_model(
        config["model_type"],
        text_config=text | {"rope_parameters": rope_of(text), "is_causal": False},
        vision_config=config["vision_config"],
        tie_word_embeddings=config["tie_word_embeddings"],
        **TOKENS,
    )
    torch.manual_seed(0)
    with device:
        backbone = AutoModelForImageTextToText.from_config(hf_config, dtype=dtype)
    backbone.config.text_config.is_causal = False
    use_packed_attention(backbone)
    scale = PixelScale(1 / 255, (0.5,) * 3, (0.5,) * 3, PATCH, 2)
    return EmbeddingModel(backbone.eval(), ModelSettings(), scale).to(device)


def make_items(count: int, side: tuple[float, int], seed: int, vocabulary: int, small: bool) -> list[EncodedItem]:
    """Random items mixed about as M-BEIR's training union.

    Args:
        side: share of items with a picture, median text tokens (`QUERY` or `DOCUMENT`).
        small: few tokens, for a CPU.
    """
    rng = np.random.default_rng(seed)
    shared: dict[tuple[int, int, int], np.ndarray] = {}
    pictures, median = side
    items = []
    for number in range(count):
        text = min(int(rng.lognormal(np.log(median), SPREAD)), MAX_TEXT)
        text, low, high, tokens = (text // 8, 2, 4, 8) if small else (text, *PICTURE_TOKENS)
        shown, parts = (), [rng.integers(FIRST_TEXT_TOKEN, vocabulary, TEMPLATE_TOKENS // 2)]
        spans = ()
        if rng.random() < pictures:
            rows = int(rng.integers(low, high))
            columns = tokens // rows
            grid = (1, rows * MERGE, columns * MERGE)
            # Pictures share pixels to save host memory; their keys differ, so the tower runs on each.
            pixels = shared.setdefault(grid, PIXELS.integers(0, 256, (np.prod(grid), 3 * PATCH**2), dtype=np.uint8))
            shown = (Picture(pixels, grid, f"{seed}-{number}"),)
            spans = (Span((1, rows, columns)),)
            parts += [np.full(rows * columns, TOKENS["image_token_id"])]
        parts += [rng.integers(FIRST_TEXT_TOKEN, vocabulary, TEMPLATE_TOKENS // 2 + text)]
        ids = np.concatenate(parts).astype(np.int32)
        positions = rotary_positions(ids == TOKENS["image_token_id"], spans, "mrope")
        items.append(EncodedItem(ids, np.ones(len(ids), dtype=bool), positions, shown))
    return items


@dataclass(frozen=True)
class Batching:
    """How items become batches: packed, padded in length buckets, or a fixed number at a time.

    Attributes:
        fixed: items per batch, in input order, padded to the longest of all items.
        sorted: with `fixed`, by length, each batch padded to its own longest item.
    """

    packed: bool = False
    fixed: int | None = None
    sorted: bool = False

    def batches(
        self, items: Sequence[EncodedItem], budget: int, device: torch.device
    ) -> Iterator[tuple[list[int], ItemBatch]]:
        """Index lists and their batches. The token budget is ignored where the number of items is fixed."""
        if self.fixed is None:
            buckets = token_buckets([item.length for item in items], budget, self.packed)
        else:
            order = sorted(range(len(items)), key=lambda n: -items[n].length) if self.sorted else range(len(items))
            buckets = [list(order[start : start + self.fixed]) for start in range(0, len(items), self.fixed)]
        longest = max(item.length for item in items)
        for bucket in buckets:
            batch = collate([items[index] for index in bucket], device, self.packed)
            yield bucket, batch if self.fixed is None or self.sorted else widened(batch, longest)

    def computed(self, items: Sequence[EncodedItem], budget: int) -> int:
        """Tokens that the language model computes, including padding."""
        return sum(batch.input_ids.numel() for _, batch in self.batches(items, budget, torch.device("cpu")))


def widened(batch: ItemBatch, length: int) -> ItemBatch:
    """The batch, padded further."""
    names = ("input_ids", "attention_mask", "pool_mask", "positions")
    more = length - batch.input_ids.shape[1]
    return replace(batch, **{name: F.pad(getattr(batch, name), (0, more)) for name in names})


PACKED, BUCKETS = Batching(packed=True), Batching()
REFERENCE, SORTED = Batching(fixed=32), Batching(fixed=32, sorted=True)


class Work:
    """FLOPs of some items over their real tokens.

    Args:
        rank: of the adapters; 0 for none.
    """

    def __init__(self, config: dict[str, Any], items: Sequence[EncodedItem], rank: int) -> None:
        shape: Shape = shape_of(config)
        lengths = [item.length for item in items]
        self.items, self.tokens = len(items), sum(lengths)
        adapters = 2 * shape.text.lora_parameters(rank) * self.tokens if rank else 0
        self.forward = sum(text_forward(shape.text, n, n) for n in lengths) + adapters
        self.backward = sum(text_backward(shape.text, n, n) for n in lengths) + 2 * adapters
        sizes = [len(picture.pixels) // MERGE**2 for item in items for picture in item.pictures]
        self.pictures = len(sizes)
        self.tower = sum(vision_forward(shape.vision, 1, tokens) for tokens in sizes)


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a large square matrix product, best of five runs of ten: the peak that this device reaches."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def ten() -> None:
        for _ in range(10):
            a @ b

    ten()
    return 10 * 2 * side**3 / min(measure(ten, device)["seconds"] for _ in range(5))


def peak_gib(device: torch.device) -> float | None:
    """Peak device memory since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
