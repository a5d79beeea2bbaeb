"""Other libraries on the benchmark model: sentence-transformers, and transformers' own processor and padded batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch.nn import functional as F
from transformers import ProcessorMixin, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def sentence_transformer(path: Path) -> SentenceTransformer:
    """Mean pooling and unit norm, as ours, in fp32 on the CPU. For `path`, see `make_peer_model`."""
    transformer = Transformer(str(path), model_kwargs={"dtype": "float32"})
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")


def open_pictures(items: list[dict]) -> list[dict]:
    """Items with their files opened but not yet decoded.

    Given paths, torchvision would decode with a library that cannot be loaded here, and sentence-transformers would
    sort by the length of the file name.
    """
    return [item | {"image": Image.open(item["image"])} if "image" in item else item for item in items]


@contextmanager
def pillow_processor(peer: SentenceTransformer) -> Iterator[None]:
    """Resize with Pillow, as we do, instead of torchvision."""
    processor, own = peer[0].processor, peer[0].processor.image_processor
    processor.image_processor = Qwen2VLImageProcessorPil(**own.to_dict())
    try:
        yield
    finally:
        processor.image_processor = own


def read_padded(processor: ProcessorMixin, items: list[dict]) -> dict[str, torch.Tensor]:
    """transformers' inputs of one batch, padded to its longest item."""
    messages = [
        [{"role": "user", "content": [{"type": kind, kind: item[kind]} for kind in ("image", "text") if kind in item]}]
        for item in open_pictures(items)
    ]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )


def embed_padded(model: Qwen2VLModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Unit vectors (n, d), the mean over all tokens."""
    mask = inputs["attention_mask"].unsqueeze(-1)
    hidden = model(**inputs).last_hidden_state
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def split_padded(inputs: dict[str, torch.Tensor], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Chunks of `size` rows, all as wide as the batch, each with its own pictures (at most one per row)."""
    grids, pixels = inputs.get("image_grid_thw"), inputs.get("pixel_values")
    by_row = {name: tensor for name, tensor in inputs.items() if name not in ("image_grid_thw", "pixel_values")}
    for start in range(0, len(inputs["input_ids"]), size):
        chunk = {name: tensor[start : start + size] for name, tensor in by_row.items()}
        count = int((chunk["mm_token_type_ids"] == 1).any(dim=1).sum())
        if count:
            patches = int(grids[:count].prod(dim=1).sum())
            chunk |= {"image_grid_thw": grids[:count], "pixel_values": pixels[:patches]}
            grids, pixels = grids[count:], pixels[patches:]
        yield chunk
