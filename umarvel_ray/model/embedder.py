"""The library's embedder: items in, unit vectors out, on one device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike

from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import EncodedItem, ItemEncoder
from umarvel_ray.items.item import Item, listed, with_instruction
from umarvel_ray.model.batch import collate, default_budget, token_buckets
from umarvel_ray.model.checkpoint import load_settings, read_provenance
from umarvel_ray.model.device import PROBE, best_device, checked_device, require_device
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.hub import model_folder
from umarvel_ray.model.int8 import load_as
from umarvel_ray.model.packing import is_packed
from umarvel_ray.model.vectors import NOT_FINITE, truncate
from umarvel_ray.presets import preset_settings
from umarvel_ray.recipe import RERANKER, ModelSettings

WINDOW = 512  # items decoded at once; the pictures of two windows are held in memory


class Embedder:
    """Embeds queries and documents with a checkpoint's own settings.

    >>> embedder = Embedder.from_pretrained(path)
    >>> queries = embedder.encode_query(["a red car", "a boat"], prompt="Find an image that matches the caption.")
    >>> scores = embedder.similarity(queries, embedder.encode_document([{"image": "car.jpg"}]))
    """

    def __init__(
        self,
        model: EmbeddingModel,
        encoder: ItemEncoder,
        device: torch.device | str = "cpu",
        truncate_dim: int | None = None,
    ) -> None:
        whole = isinstance(truncate_dim, int) and not isinstance(truncate_dim, bool)
        if truncate_dim is not None and not (whole and 1 <= truncate_dim <= model.dimension):
            raise UserError(f"truncate_dim is {truncate_dim!r}; give 1 to {model.dimension}, the model's dimension")
        self.truncate_dim = truncate_dim
        self.model = model.to(device).eval()
        self.encoder = encoder
        self.device = torch.device(device)
        self.packed = is_packed("auto", device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "float32",
        settings: ModelSettings | None = None,
        preset: str | None = None,
        generation_prompt: bool = True,
        truncate_dim: int | None = None,
        revision: str | None = None,
        base: str | Path | None = None,
    ) -> Embedder:
        """Load a checkpoint. One without `umarvel.json` (a base, a released one) needs `settings` or `preset`.

        Args:
            path: a directory, or an id on the Hugging Face Hub, of a model or a PEFT adapter (see `model_folder`).
            device: by default the best one: "cuda", "mps" if the model runs there, or "cpu".
            dtype: a PyTorch dtype, or "int8" (see `int8`).
            preset: the system that released the checkpoint, whose own code it is then embedded as: "reference" for
                U-MARVEL's authors, or "gme", "lamra-ret" … (docs/guide.md#presets).
            generation_prompt: with "reference": their evaluation appends one, their training does not
                (docs/method.md#generation-prompt).
            truncate_dim: keep this many coordinates of each vector, scaled to unit norm again; for checkpoints that
                were trained with `matryoshka`.
            revision: branch, tag or commit on the Hub.
            base: of an adapter, if it is neither named by it nor beside it.

        Raises:
            UserError: not a checkpoint; missing or truncated files; a preset that is unknown or for other models; no
                such dimension or device.
        """
        folder = model_folder(path, revision, base)
        if preset:
            settings = preset_settings(preset, "embedder", folder)
            if preset == "reference":
                settings = settings.model_copy(update={"generation_prompt": generation_prompt})
        if settings is None:
            settings = load_settings(folder)
            if read_provenance(folder).get("phase") == RERANKER:
                raise UserError(f"{folder} is a reranker's checkpoint; open it with Reranker.from_pretrained")
        chosen = best_device() if device is None else device
        require_device(chosen)
        model = load_as(dtype, chosen, partial(EmbeddingModel.from_pretrained, folder, settings))
        encoder = ItemEncoder.from_pretrained(folder, settings)
        if device is None:
            chosen = checked_device(str(chosen), lambda tried: cls(model, encoder, tried).encode(PROBE))
        return cls(model, encoder, chosen, truncate_dim)

    @property
    def dimension(self) -> int:
        return self.truncate_dim or self.model.dimension

    def encode_query(
        self, items: Sequence[Item | str] | Item | str, prompt: str | None = None, *, token_budget: int | None = None
    ) -> np.ndarray:
        """Embed queries.

        Args:
            items: one item or a sequence of them; a bare string is text.
            prompt: the instruction of every item without one of its own.
            token_budget: the most tokens in a batch, padding included; by default what suits the device.

        Returns:
            float32 (n, d), rows of unit norm, in the order given; (d,) for one item.

        Raises:
            UserError: see `ItemEncoder.encode`.
        """
        return self._encode(items, "query", prompt, token_budget)

    def encode_document(
        self, items: Sequence[Item | str] | Item | str, prompt: str | None = None, *, token_budget: int | None = None
    ) -> np.ndarray:
        """Embed documents; otherwise as `encode_query`, but a `prompt` is refused: documents carry no instruction,
        unless the preset says so (`ItemEncoder.takes_document_instructions`)."""
        return self._encode(items, "document", prompt, token_budget)

    def encode(
        self, items: Sequence[Item | str] | Item | str, prompt: str | None = None, *, token_budget: int | None = None
    ) -> np.ndarray:
        """Embed items that are neither queries nor documents, such as those to be clustered: as `encode_query`.

        Without an instruction the two sides give the same vector.
        """
        return self.encode_query(items, prompt, token_budget=token_budget)

    @torch.inference_mode()
    def embed_encoded(self, encoded: Sequence[EncodedItem], token_budget: int | None = None) -> np.ndarray:
        """`encode` for items that are tokenized already: float32 (n, d)."""
        result = np.empty((len(encoded), self.dimension), dtype=np.float32)
        budget = token_budget or default_budget(self.device)
        for bucket in token_buckets([item.length for item in encoded], budget, self.packed):
            batch = collate([encoded[index] for index in bucket], self.device, self.packed)
            result[bucket] = truncate(self.model(batch), self.dimension).cpu().numpy()
        if len(lost := np.flatnonzero(~np.isfinite(result).all(axis=1))):
            raise UserError(f"item {lost[0]}: its embedding is not finite; {NOT_FINITE}")
        return result

    @staticmethod
    def similarity(a: ArrayLike, b: ArrayLike) -> np.ndarray:
        """Cosines float32 (n, m) of vectors (n, d) and (m, d), of any norm; one vector (d,) counts as a row."""
        cosines: np.ndarray = _unit_rows(a) @ _unit_rows(b).T
        return cosines

    def _encode(
        self, items: Sequence[Item | str] | Item | str, side: str, prompt: str | None, token_budget: int | None
    ) -> np.ndarray:
        if not isinstance(prompt, str | None):
            raise UserError(f"prompt: must be text, not {type(prompt).__name__}")
        if prompt and side == "document" and not self.encoder.takes_document_instructions:
            raise UserError("prompt: a document carries no instruction; put it on the query")
        if isinstance(items, str | dict):
            vector: np.ndarray = self._encode([items], side, prompt, token_budget)[0]
            return vector
        given = listed(items, f"{side} items")  # a pandas Series is indexed by its labels, not in the order given
        parts = [np.empty((0, self.dimension), dtype=np.float32)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:

            def encode_one(index: int) -> EncodedItem:
                return self.encoder.encode(with_instruction(given[index], prompt), side, f"{side} {index}")

            def prepare(start: int) -> Iterator[EncodedItem]:
                return threads.map(encode_one, range(start, min(start + WINDOW, len(given))))

            coming = prepare(0)
            for start in range(0, len(given), WINDOW):
                # The next window is decoded and tokenized while the model works on this one.
                window, coming = list(coming), prepare(start + WINDOW)
                parts.append(self.embed_encoded(window, token_budget))
        return np.concatenate(parts)


def _unit_rows(vectors: ArrayLike) -> np.ndarray:
    rows = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
    norms = np.linalg.norm(rows, axis=1, keepdims=True).astype(np.float32)
    unit: np.ndarray = rows / norms.clip(1e-12)
    return unit
