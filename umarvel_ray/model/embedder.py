"""The library's embedder: items in, unit vectors out, on one device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import EncodedItem, ItemEncoder
from umarvel_ray.items.item import Item
from umarvel_ray.model.batch import collate, default_budget, token_buckets
from umarvel_ray.model.checkpoint import load_settings
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.int8 import load_as
from umarvel_ray.model.packing import is_packed
from umarvel_ray.model.vectors import truncate
from umarvel_ray.recipe import ModelSettings

WINDOW = 512  # items decoded at once; the pictures of two windows are held in memory


class Embedder:
    """Embeds queries and documents with a checkpoint's own settings.

    >>> embedder = Embedder.from_pretrained(path)
    >>> queries = embedder.encode_query([{"text": "a red car", "instruction": "Find an image that matches."}])
    >>> scores = embedder.similarity(queries, embedder.encode_document([{"image": "car.jpg"}]))
    """

    def __init__(
        self,
        model: EmbeddingModel,
        encoder: ItemEncoder,
        device: torch.device | str = "cpu",
        truncate_dim: int | None = None,
    ) -> None:
        if truncate_dim is not None and not 1 <= truncate_dim <= model.dimension:
            raise UserError(f"truncate_dim is {truncate_dim}; give 1 to {model.dimension}, the model's dimension")
        self.truncate_dim = truncate_dim
        self.model = model.to(device).eval()
        self.encoder = encoder
        self.device = torch.device(device)
        self.packed = is_packed("auto", device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "float32",
        settings: ModelSettings | None = None,
        preset: Literal["reference"] | None = None,
        generation_prompt: bool = True,
        truncate_dim: int | None = None,
    ) -> Embedder:
        """Load a checkpoint. A directory without `umarvel.json` (a base, a released one) needs `settings` or `preset`.

        Args:
            dtype: of PyTorch, or "int8" (see `int8`).
            preset: "reference" for a checkpoint that U-MARVEL's authors released, embedded as their code does.
            generation_prompt: with the preset: their evaluation appends one, their training does not (trap T4).
            truncate_dim: keep so many coordinates of each vector, scaled to unit norm again; for checkpoints that were
                trained with `matryoshka`.

        Raises:
            UserError: not a checkpoint; missing or truncated files; another preset; no such dimension.
        """
        if preset not in (None, "reference"):
            raise UserError(f"preset '{preset}' is not known; the only one is 'reference'")
        if preset:
            settings = ModelSettings.reference(generation_prompt)
        settings = settings or load_settings(path)
        model = load_as(dtype, device, partial(EmbeddingModel.from_pretrained, path, settings))
        return cls(model, ItemEncoder.from_pretrained(path, settings), device, truncate_dim)

    @property
    def dimension(self) -> int:
        return self.truncate_dim or self.model.dimension

    def encode_query(self, items: Sequence[Item | str], token_budget: int | None = None) -> np.ndarray:
        """Embed queries: float32 (n, d), rows of unit norm, in the order given.

        Args:
            token_budget: padded tokens of a batch; by default what suits the device.

        Raises:
            UserError: see `ItemEncoder.encode`.
        """
        return self._encode(items, "query", token_budget)

    def encode_document(self, items: Sequence[Item | str], token_budget: int | None = None) -> np.ndarray:
        """Embed documents; otherwise as `encode_query`."""
        return self._encode(items, "document", token_budget)

    @torch.inference_mode()
    def encode(self, encoded: Sequence[EncodedItem], token_budget: int | None = None) -> np.ndarray:
        """Embed items that are tokenised already, in batches of at most `token_budget` tokens, padding included."""
        result = np.empty((len(encoded), self.dimension), dtype=np.float32)
        budget = token_budget or default_budget(self.device)
        for bucket in token_buckets([item.length for item in encoded], budget, self.packed):
            batch = collate([encoded[index] for index in bucket], self.device, self.packed)
            result[bucket] = truncate(self.model(batch), self.dimension).cpu().numpy()
        return result

    @staticmethod
    def similarity(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosines (n_queries, n_documents) of unit vectors."""
        return queries @ documents.T

    def _encode(self, items: Sequence[Item | str], side: str, token_budget: int | None) -> np.ndarray:
        if isinstance(items, str | dict):
            raise TypeError("give a list of items, not one item")
        parts = [np.empty((0, self.dimension), dtype=np.float32)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:

            def prepare(start: int) -> Iterator[EncodedItem]:
                window = range(start, min(start + WINDOW, len(items)))
                return threads.map(lambda i: self.encoder.encode(items[i], side, f"{side} {i}"), window)

            coming = prepare(0)
            for start in range(0, len(items), WINDOW):
                # The next window is decoded and tokenised while the model works on this one.
                window, coming = list(coming), prepare(start + WINDOW)
                parts.append(self.encode(window, token_budget))
        return np.concatenate(parts)
