"""A repeatable sample of a query table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def sample_queries(queries: pa.Table, count: int | None, seed: int) -> pa.Table:
    """`count` rows without repetition, in table order; all of them when `count` is None or reaches their number."""
    if count is None or count >= queries.num_rows:
        return queries
    chosen = np.random.default_rng(seed).choice(queries.num_rows, count, replace=False)
    return queries.take(pa.array(np.sort(chosen)))
