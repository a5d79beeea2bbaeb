"""Retrieved documents, and their order once a reranker has read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from umarvel_ray.data.tables import item_of

RERANK_DEPTH = 50  # candidates of the first stage that are reranked


@dataclass(frozen=True)
class Hit:
    """A retrieved document: its row (id, text, image, modality, source), cosine, and P(yes) once reranked."""

    document: dict[str, Any]
    score: float
    rerank_score: float | None = None

    @property
    def item(self) -> dict[str, Any]:
        return item_of(self.document)


def fuse_hits(hits: Sequence[Hit], p_yes: np.ndarray, weight: float) -> list[Hit]:
    """Reorder by cosine + weight · P(yes); equal sums keep the first stage's order."""
    fused = [
        replace(hit, score=hit.score + weight * float(p), rerank_score=float(p))
        for hit, p in zip(hits, p_yes, strict=True)
    ]
    return sorted(fused, key=lambda hit: -hit.score)
