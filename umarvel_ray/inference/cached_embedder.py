"""Embeds table rows and caches, across checkpoints, whatever does not depend on the trained weights.

Only the language model changes along the ladder; token ids and the outputs of the frozen vision tower do not. Both are
cached per item, up to `cache_bytes`, so that evaluating the next checkpoint runs the language model alone. The cache is
cleared when the tower's weights change. A row that cannot be embedded is returned with a reason instead of raising.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from umarvel_ray.caches import ByteCache
from umarvel_ray.data.content import content_key
from umarvel_ray.data.dataset import item_of
from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import EncodedItem, ItemEncoder
from umarvel_ray.items.pictures import Picture
from umarvel_ray.model.batch import collate, token_buckets
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.multimodal import distinct
from umarvel_ray.model.vectors import truncate

WINDOW = 256  # rows decoded ahead of the model
NO_PIXELS = np.empty((0, 0), dtype=np.uint8)

Row = dict[str, Any]  # of a documents or queries table


class CachedItem(NamedTuple):
    """An item ready for the language model: its token ids without pixels, and the tower's features of its pictures."""

    item: EncodedItem
    features: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return 16 * self.item.length + sum(feature.nbytes for feature in self.features)


class CachedEmbedder:
    """An embedder for bulk work on one device.

    Args:
        threads: how many threads decode and tokenize the next rows while the model runs.
        cache_bytes: size limit of the cache; 0 disables it.
    """

    def __init__(self, device: str, dtype: str, token_budget: int, threads: int, cache_bytes: int) -> None:
        self._device, self._dtype, self._token_budget = device, dtype, token_budget
        self._threads = ThreadPoolExecutor(threads)
        self._current: Embedder | None = None
        self._loaded: tuple[CheckpointRef, int | None] | None = None
        self._tower_digest = self._encoder_digest = b""
        self._items: ByteCache[Hashable, CachedItem] = ByteCache(cache_bytes, lambda item: item.nbytes)
        self._features: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()  # by picture key

    def load(self, ref: CheckpointRef, truncate_dim: int | None = None) -> None:
        """Load a checkpoint unless it is already loaded.

        Raises:
            UserError: see `Embedder.from_pretrained`.
        """
        requested = (ref, truncate_dim)
        if requested == self._loaded:
            return
        self._current = self._loaded = None  # frees the old weights before the new ones are read
        self._current = Embedder.from_pretrained(
            ref.path, self._device, self._dtype, ref.settings, truncate_dim=truncate_dim
        )
        self._loaded = requested
        self._encoder_digest = _digest_of_encoder(self._current.encoder)
        tower_digest = _digest_of_weights(self._current.model.backbone.model.visual)
        if tower_digest != self._tower_digest:
            self._items.clear()
            self._tower_digest = tower_digest

    @property
    def _embedder(self) -> Embedder:
        assert self._current is not None, "call load() first"
        return self._current

    def embed(self, rows: Sequence[Row], side: str) -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
        """Embed rows of a documents or queries table.

        Returns:
            ids and unit vectors, float32 (n, d), of the rows that could be embedded, in input order; and (id, reason)
            for each row that could not.
        """
        order = sorted(range(len(rows)), key=lambda index: _rough_length(rows[index]))
        vectors = np.full((len(rows), self._embedder.dimension), np.nan, np.float32)
        reasons: dict[int, str] = {}
        for window, futures in self._encode_ahead(rows, order, side):
            ready: dict[int, CachedItem | EncodedItem] = {}
            for index, future in zip(window, futures, strict=True):
                try:
                    ready[index] = future.result()
                except UserError as error:
                    reasons[index] = str(error)
            if ready:
                vectors[list(ready)] = self._embed_window(list(ready.values()), [rows[i] for i in ready], side)
        for index in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
            reasons.setdefault(index, f"{side} {rows[index]['id']}: the embedding is not finite")
        used = [index for index in range(len(rows)) if index not in reasons]
        quarantined = [(rows[index]["id"], reasons[index]) for index in sorted(reasons)]
        return [rows[index]["id"] for index in used], vectors[used], quarantined

    def _encode_ahead(
        self, rows: Sequence[Row], order: list[int], side: str
    ) -> Iterator[tuple[list[int], list[Future[CachedItem | EncodedItem]]]]:
        """Yield windows of row numbers with their encoded items; the next window is always being encoded."""

        def submit(window: list[int]) -> tuple[list[int], list[Future[CachedItem | EncodedItem]]]:
            return window, [self._threads.submit(self._encode, rows[index], side) for index in window]

        windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
        pending = None
        for window in windows:
            submitted = submit(window)
            if pending:
                yield pending
            pending = submitted
        if pending:
            yield pending

    def _encode(self, row: Row, side: str) -> CachedItem | EncodedItem:
        cached = self._items.get(self._key(row, side))
        if cached is not None:
            return cached
        return self._embedder.encoder.encode(item_of(row), side, f"{side} {row['id']}")

    @torch.inference_mode()
    def _embed_window(self, items: list[CachedItem | EncodedItem], rows: list[Row], side: str) -> np.ndarray:
        features = self._run_tower([item for item in items if isinstance(item, EncodedItem)])
        ready = [item if isinstance(item, CachedItem) else _without_pixels(item, features) for item in items]
        result = np.empty((len(ready), self._embedder.dimension), np.float32)
        packed = self._embedder.packed
        for bucket in token_buckets([entry.item.length for entry in ready], self._token_budget, packed):
            entries = [ready[index] for index in bucket]
            batch = collate([entry.item for entry in entries], self._device, packed)
            visual = {
                key: feature
                for entry in entries
                for key, feature in zip((p.key for p in entry.item.pictures), entry.features, strict=True)
            }
            vectors = truncate(self._embedder.model(batch, visual), self._embedder.dimension)
            result[bucket] = vectors.float().cpu().numpy()
        for row, entry in zip(rows, ready, strict=True):
            self._items.put(self._key(row, side), entry)
        return result

    def _run_tower(self, items: list[EncodedItem]) -> dict[str, torch.Tensor]:
        """The tower's features of every picture in these items, by picture key, each computed once."""
        features: dict[str, torch.Tensor] = {}
        new: list[Picture] = []
        for key, picture in distinct([picture for item in items for picture in item.pictures]).items():
            if (feature := self._features.get(key)) is not None:
                features[key] = feature
            else:
                new.append(picture)
        for bucket in token_buckets([len(picture.pixels) for picture in new], 4 * self._token_budget, packed=True):
            chosen = [new[index] for index in bucket]
            for picture, feature in zip(chosen, self._embedder.model.run_tower(chosen), strict=True):
                # A copy: the tower's outputs are views of one tensor, which any single view would keep alive.
                features[picture.key] = self._features[picture.key] = feature.to("cpu", copy=True)
        return features

    def _key(self, row: Row, side: str) -> Hashable:
        return self._encoder_digest, side, content_key(row), row.get("instruction")


def _without_pixels(item: EncodedItem, features: dict[str, torch.Tensor]) -> CachedItem:
    pictures = tuple(replace(picture, pixels=NO_PIXELS) for picture in item.pictures)
    return CachedItem(replace(item, pictures=pictures), tuple(features[picture.key] for picture in item.pictures))


def _rough_length(row: Row) -> tuple[bool, int]:
    return row.get("image") is not None, len(row.get("text") or "")


def _digest_of_weights(module: torch.nn.Module) -> bytes:
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def _digest_of_encoder(encoder: ItemEncoder) -> bytes:
    parts = (
        encoder.tokenizer.backend_tokenizer.to_str(),
        str(encoder.tokenizer.chat_template),
        repr(encoder.picture_format),
        encoder.settings.model_dump_json(),
    )
    return hashlib.sha256("\0".join(parts).encode()).digest()
