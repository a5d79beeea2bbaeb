"""Retrieved documents, and their order after reranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from umarvel_ray.data.content import MEDIA
from umarvel_ray.data.dataset import item_of
from umarvel_ray.items.images import pictures_of

RERANK_DEPTH = 50  # retrieved candidates that are reranked


@dataclass(frozen=True)
class Hit:
    """A retrieved document: its row (id, text, image, modality, source), cosine, and P(yes) once reranked.

    Attributes:
        pictures: how many the document has, if it is `light`.
    """

    document: dict[str, Any]
    score: float
    rerank_score: float | None = None
    pictures: int = 0

    @property
    def item(self) -> dict[str, Any]:
        """The document as an item."""
        return item_of(self.document)

    @property
    def light(self) -> Hit:
        """The hit without its document's pictures and video; one that has none stays as it is."""
        if not self.document.keys() & set(MEDIA):
            return self
        document = {name: value for name, value in self.document.items() if name not in MEDIA}
        return replace(self, document=document, pictures=len(pictures_of(self.document.get("image"))))

    @property
    def has_media(self) -> bool:
        """Whether the document has pictures or a video, by its modality."""
        return not set(MEDIA).isdisjoint(self.document["modality"].split(","))


def media_bytes(document: dict[str, Any]) -> int:
    """The size of a document's pictures and video; those given by path are small."""
    return sum(len(part) for name in MEDIA for part in pictures_of(document.get(name)) if part is not None)


def fuse_hits(hits: Sequence[Hit], p_yes: np.ndarray, weight: float) -> list[Hit]:
    """Reorder by cosine + weight · P(yes) (docs/method.md#score-fusion); ties keep the retrieval order.

    Args:
        p_yes: (n,), the reranker's score of each hit.
    """
    fused = [
        replace(hit, score=hit.score + weight * float(p), rerank_score=float(p))
        for hit, p in zip(hits, p_yes, strict=True)
    ]
    return sorted(fused, key=lambda hit: -hit.score)
