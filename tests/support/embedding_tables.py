"""Documents to embed in bulk, and what the library's embedder makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.support.small_dataset import noise_picture
from umarvel_ray.data.dataset import Selection, item_of
from umarvel_ray.data.stored import write_stored
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.recipe import ModelSettings

SETTINGS = ModelSettings(min_pixels=4096, max_pixels=4096, max_text_tokens=96)
SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("image", pa.binary())])


def picture(seed: int) -> bytes:
    return noise_picture(seed, width=64, height=48)


def make_documents(count: int) -> pa.Table:
    """Texts, pictures, and both, in turn."""
    rows = [
        {
            "id": f"d{i}",
            "text": None if i % 3 == 1 else f"a boat and {'harbor lights ' * (i % 7)}{i}",
            "image": None if i % 3 == 0 else picture(i % 11),
        }
        for i in range(count)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def stored(table: pa.Table, folder: Path) -> Selection:
    """All rows of a table, on disk."""
    return Selection.whole(write_stored(folder / "rows.arrow", table.schema, table.to_batches()))


def with_image(table: pa.Table, row: int, image: bytes) -> pa.Table:
    images = table["image"].to_pylist()
    images[row] = image
    return table.set_column(2, "image", pa.array(images, pa.binary()))


def embed_singly(base: Path, rows: Sequence[dict], side: str = "document") -> np.ndarray:
    """Vectors (n, d) by the library's embedder, one item at a time: no cache, no padding, no Ray."""
    embedder = Embedder.from_pretrained(base, settings=SETTINGS)
    encode = embedder.encode_query if side == "query" else embedder.encode_document
    return np.concatenate([encode([item_of(row)]) for row in rows])
