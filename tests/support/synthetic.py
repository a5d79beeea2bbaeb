"""Queries without a table, for code that looks at row numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from umarvel_ray.data.dataset import Queries
from umarvel_ray.ragged import Ragged

NO_TABLE: Any = None


def make_queries(positives: Sequence[Sequence[int]], tasks: Sequence[str] | None = None, first: int = 1000) -> Queries:
    """Queries in every second row from `first`, so that a row is never a position."""
    names, task = np.unique(tasks or ["t"] * len(positives), return_inverse=True)
    rows = first + 2 * np.arange(len(positives))
    return Queries(NO_TABLE, rows, Ragged.of(positives), tuple(names.tolist()), task)
