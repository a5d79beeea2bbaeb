"""The library's embedder: items in, unit vectors out, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from umarvel_ray.model.batch import collate, token_buckets
from umarvel_ray.model.checkpoint import load_settings
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.items import EncodedItem, Item, ItemEncoder
from umarvel_ray.model.packing import is_packed
from umarvel_ray.recipe import ModelSettings

WINDOW = 1024  # items whose pictures are held in memory at once


class Embedder:
    """Embeds queries and documents with a checkpoint's own settings.

    >>> embedder = Embedder.from_pretrained(path)
    >>> queries = embedder.encode_query([{"text": "a red car", "instruction": "Find an image that matches."}])
    >>> scores = embedder.similarity(queries, embedder.encode_document([{"image": "car.jpg"}]))
    """

    def __init__(self, model: EmbeddingModel, encoder: ItemEncoder, device: torch.device | str = "cpu") -> None:
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
    ) -> Embedder:
        """Load a checkpoint. A directory without `umarvel.json` (a base, a released one) needs `settings` or `preset`.

        Args:
            preset: "reference" for a checkpoint that U-MARVEL's authors released, embedded as their code does.
            generation_prompt: with the preset: their evaluation appends one, their training does not (trap T4).

        Raises:
            UserError: not a checkpoint; missing or truncated files.
        """
        if preset == "reference":
            settings = ModelSettings.reference(generation_prompt)
        settings = settings or load_settings(path)
        model = EmbeddingModel.from_pretrained(path, settings, dtype)
        return cls(model, ItemEncoder.from_pretrained(path, settings), device)

    @property
    def dimension(self) -> int:
        return self.model.dimension

    def encode_query(self, items: Sequence[Item | str], token_budget: int = 16384) -> np.ndarray:
        """Embed queries: float32 (n, d), rows of unit norm, in the order given. Raises: see `ItemEncoder.encode`."""
        return self._encode(items, "query", token_budget)

    def encode_document(self, items: Sequence[Item | str], token_budget: int = 16384) -> np.ndarray:
        """Embed documents: float32 (n, d), rows of unit norm, in the order given."""
        return self._encode(items, "document", token_budget)

    @torch.inference_mode()
    def encode(self, encoded: Sequence[EncodedItem], token_budget: int = 16384) -> np.ndarray:
        """Embed items that are tokenised already, in batches of at most `token_budget` tokens, padding included."""
        result = np.empty((len(encoded), self.dimension), dtype=np.float32)
        for bucket in token_buckets([item.length for item in encoded], token_budget, self.packed):
            batch = collate([encoded[index] for index in bucket], self.device, self.packed)
            result[bucket] = self.model(batch).cpu().numpy()
        return result

    @staticmethod
    def similarity(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Cosines (n_queries, n_documents) of unit vectors."""
        return queries @ documents.T

    def _encode(self, items: Sequence[Item | str], side: str, token_budget: int) -> np.ndarray:
        if isinstance(items, str | dict):
            raise TypeError("give a list of items, not one item")
        parts = [np.empty((0, self.dimension), dtype=np.float32)]
        for start in range(0, len(items), WINDOW):
            window = items[start : start + WINDOW]
            encoded = [self.encoder.encode(item, side, f"{side} {start + i}") for i, item in enumerate(window)]
            parts.append(self.encode(encoded, token_budget))
        return np.concatenate(parts)
