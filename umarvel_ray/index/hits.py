"""Retrieved documents, and their order after reranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from umarvel_ray.data.dataset import item_of

RERANK_DEPTH = 50  # retrieved candidates that are reranked


@dataclass(frozen=True)
class Hit:
    """A retrieved document: its row (id, text, image, modality, source), cosine, and P(yes) once reranked."""

    document: dict[str, Any]
    score: float
    rerank_score: float | None = None

    @property
    def item(self) -> dict[str, Any]:
        """The document as an item."""
        return item_of(self.document)


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
