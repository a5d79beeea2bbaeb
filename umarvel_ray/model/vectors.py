"""Embeddings in fewer dimensions: the first coordinates, renormalized (Matryoshka, arXiv 2205.13147)."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

NOT_FINITE = "open the checkpoint in float32 or bfloat16, or train it again if it was trained to NaN"


def truncate(vectors: torch.Tensor, dimension: int) -> torch.Tensor:
    """The first coordinates of (N, D) unit vectors, renormalized: (N, dimension), float32 if D > dimension."""
    return vectors if dimension >= vectors.shape[1] else F.normalize(vectors[:, :dimension].float(), dim=-1)


def truncate_array(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """`truncate` for numpy arrays (N, D)."""
    if dimension >= vectors.shape[1]:
        return vectors
    return truncate(torch.tensor(vectors), dimension).numpy()  # copies: arrays from Ray's object store are read-only
