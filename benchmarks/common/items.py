"""Mixed items for the speed benchmarks: short and long texts, and pictures in JPEG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from umarvel_ray import demo
from umarvel_ray.items.images import open_image
from umarvel_ray.items.template import format_string

KINDS = {"short text": 0.4, "long text": 0.2, "image": 0.2, "image+text": 0.2}  # shares
EXTRACTS = (2, 8)  # Wikipedia extracts in a long text: from, below
FILE_SIDES = (150, 500)  # pixels: from, below

T = TypeVar("T")


class ItemMaker:
    """Items from the demo's documents; pictures are enlarged to the size of pictures on the web."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        folder.mkdir()
        rows = pq.read_table(demo.DATA / "documents.parquet", columns=["text", "image", "source"]).to_pylist()
        self.short = [row["text"] for row in rows if row["text"] and row["source"] in ("emoji", "clipart", "keywords")]
        self.extracts = [row["text"] for row in rows if row["text"] and row["source"] == "wiki"]
        self.images = [row["image"] for row in rows if row["image"]]

    def short_text(self) -> str:
        return format_string(self._pick(self.short))

    def long_text(self) -> str:
        return format_string(" ".join(self._pick(self.extracts) for _ in range(self.rng.integers(*EXTRACTS))))

    def image_file(self) -> str:
        """A new file; no two show the same picture."""
        number = len(list(self.folder.iterdir()))
        size = tuple(self.rng.integers(*FILE_SIDES, 2).tolist())
        picture = open_image(self.images[number], "picture").resize(size, Image.Resampling.BICUBIC)
        path = self.folder / f"{number}.jpg"
        picture.save(path, quality=90)
        return str(path)

    def item(self, kind: str) -> dict[str, str]:
        item = {}
        if kind.startswith("image"):
            item["image"] = self.image_file()
        if kind.endswith("text"):
            item["text"] = self.long_text() if kind == "long text" else self.short_text()
        return item

    def items(self, count: int) -> list[dict[str, str]]:
        """Items of the kinds in `KINDS`, in random order."""
        return [self.item(kind) for kind in self.rng.choice(list(KINDS), count, p=list(KINDS.values()))]

    def pairs(self, kinds: Sequence[tuple[str, str]], count: int) -> tuple[list[dict], list[dict]]:
        """Queries and their documents, with the two kinds of each pair drawn from `kinds`."""
        chosen = [self._pick(kinds) for _ in range(count)]
        return [self.item(query) for query, _ in chosen], [self.item(document) for _, document in chosen]

    def _pick(self, values: Sequence[T]) -> T:
        return values[self.rng.integers(len(values))]
