"""Embeds table rows, remembering across checkpoints what does not depend on the trained weights.

Along the ladder only the language model changes: token ids and the frozen vision tower's outputs stay. Both are kept
per item, up to `cache_bytes`, so that evaluating the next checkpoint pays for the language model alone. The cache is
emptied when the tower's weights differ. A row that cannot be used is returned with its reason, never raised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from umarvel_ray.caches import ByteCache
from umarvel_ray.data.tables import ITEM_COLUMNS, item_of
from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import EncodedItem, ItemEncoder
from umarvel_ray.items.pictures import Picture
from umarvel_ray.model.batch import collate, token_buckets
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.multimodal import distinct
from umarvel_ray.model.vectors import truncate

WINDOW = 256  # rows decoded ahead of the model
NOTHING = np.empty((0, 0), dtype=np.uint8)


class Known(NamedTuple):
    """One item ready for the language model: token ids without pixels, and its pictures' features."""

    item: EncodedItem
    features: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        return 16 * self.item.length + sum(feature.nbytes for feature in self.features)


class CachedEmbedder:
    """An embedder for bulk work on one device.

    Args:
        threads: that decode and tokenise the next rows while the model works on these.
        cache_bytes: memory for what is remembered; 0 remembers nothing.
    """

    def __init__(self, device: str, dtype: str, token_budget: int, threads: int, cache_bytes: int) -> None:
        self._device, self._dtype, self._token_budget = device, dtype, token_budget
        self._threads = ThreadPoolExecutor(threads)
        self._embedder: Embedder | None = None
        self._loaded: tuple | None = None
        self._tower = self._encoding = b""
        self._known: ByteCache[tuple, Known] = ByteCache(cache_bytes, lambda known: known.nbytes)
        self._features: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()

    def load(self, ref: CheckpointRef, truncate_dim: int | None = None) -> None:
        """Make `ref` the checkpoint in use; nothing happens when it is.

        Raises:
            UserError: see `Embedder.from_pretrained`.
        """
        wanted = (ref, truncate_dim)
        if wanted == self._loaded:
            return
        self._embedder = None  # frees the old weights before the new ones are read
        self._embedder = Embedder.from_pretrained(
            ref.path, self._device, self._dtype, ref.settings, truncate_dim=truncate_dim
        )
        self._loaded = wanted
        self._encoding = _digest_of_encoder(self._embedder.encoder)
        tower = _digest_of_weights(self._embedder.model.backbone.model.visual)
        if tower != self._tower:
            self._known.clear()
            self._tower = tower

    def embed(self, rows: Sequence[dict], side: str) -> tuple[list[str], np.ndarray, list[tuple[str, str]]]:
        """Embed rows of a documents or queries table.

        Returns:
            ids and vectors, float32 (n, d) of unit norm, of the rows that could be used, in the order given; and (id,
            reason) of those that could not.
        """
        order = sorted(range(len(rows)), key=lambda index: _rough_length(rows[index]))
        vectors = np.full((len(rows), self._embedder.dimension), np.nan, np.float32)
        reasons: dict[int, str] = {}
        for window, futures in self._prepared(rows, order, side):
            ready: dict[int, Known | EncodedItem] = {}
            for index, future in zip(window, futures, strict=True):
                try:
                    ready[index] = future.result()
                except UserError as error:
                    reasons[index] = str(error)
            if ready:
                vectors[list(ready)] = self._embed_window(list(ready.values()), [rows[i] for i in ready], side)
        for index in np.flatnonzero(~np.isfinite(vectors).all(axis=1)):
            reasons.setdefault(int(index), f"{side} {rows[index]['id']}: the embedding is not finite")
        used = [index for index in range(len(rows)) if index not in reasons]
        quarantined = [(rows[index]["id"], reasons[index]) for index in sorted(reasons)]
        return [rows[index]["id"] for index in used], vectors[used], quarantined

    def _prepared(
        self, rows: Sequence[dict], order: list[int], side: str
    ) -> Iterator[tuple[list[int], list[Future[Known | EncodedItem]]]]:
        """Windows of row numbers with their items, the next window always under way."""

        def submit(window: list[int]) -> tuple[list[int], list[Future]]:
            return window, [self._threads.submit(self._prepare, rows[index], side) for index in window]

        windows = [order[start : start + WINDOW] for start in range(0, len(order), WINDOW)]
        under_way = submit(windows[0]) if windows else None
        for _, following in pairwise([*windows, None]):
            current, under_way = under_way, submit(following) if following else None
            yield current

    def _prepare(self, row: dict, side: str) -> Known | EncodedItem:
        known = self._known.get(self._key(row, side))
        if known is not None:
            return known
        return self._embedder.encoder.encode(item_of(row), side, f"{side} {row['id']}")

    @torch.inference_mode()
    def _embed_window(self, items: list[Known | EncodedItem], rows: list[dict], side: str) -> np.ndarray:
        fresh = [item for item in items if isinstance(item, EncodedItem)]
        held = self._run_tower(fresh)
        known = [item if isinstance(item, Known) else _without_pixels(item, held) for item in items]
        result = np.empty((len(known), self._embedder.dimension), np.float32)
        packed = self._embedder.packed
        for bucket in token_buckets([entry.item.length for entry in known], self._token_budget, packed):
            entries = [known[index] for index in bucket]
            batch = collate([entry.item for entry in entries], self._device, packed)
            visual = {
                key: feature
                for entry in entries
                for key, feature in zip((p.key for p in entry.item.pictures), entry.features, strict=True)
            }
            vectors = truncate(self._embedder.model(batch, visual), self._embedder.dimension)
            result[bucket] = vectors.float().cpu().numpy()
        for row, entry in zip(rows, known, strict=True):
            self._known.put(self._key(row, side), entry)
        return result

    def _run_tower(self, items: list[EncodedItem]) -> dict[str, torch.Tensor]:
        """The tower's features of every picture of these items, by picture key, each computed once."""
        held: dict[str, torch.Tensor] = {}
        new: list[Picture] = []
        for key, picture in distinct([picture for item in items for picture in item.pictures]).items():
            if (feature := self._features.get(key)) is not None:
                held[key] = feature
            else:
                new.append(picture)
        for bucket in token_buckets([len(picture.pixels) for picture in new], 4 * self._token_budget, packed=True):
            chosen = [new[index] for index in bucket]
            for picture, feature in zip(chosen, self._embedder.model.run_tower(chosen), strict=True):
                # A copy: the tower's outputs are views of one tensor, which any of them would keep alive.
                held[picture.key] = self._features[picture.key] = feature.to("cpu", copy=True)
        return held

    def _key(self, row: dict, side: str) -> tuple:
        digest = hashlib.sha1()
        for part in (row.get(column) for column in ITEM_COLUMNS):
            data = part if isinstance(part, bytes) else json.dumps(part).encode()
            digest.update(b"%d:" % len(data) + data)
        return self._encoding, side, digest.digest()


def _without_pixels(item: EncodedItem, features: dict[str, torch.Tensor]) -> Known:
    seen = tuple(replace(picture, pixels=NOTHING) for picture in item.pictures)
    return Known(replace(item, pictures=seen), tuple(features[picture.key] for picture in item.pictures))


def _rough_length(row: dict) -> tuple[bool, int]:
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
