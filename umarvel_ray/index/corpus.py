"""A searchable corpus: an index, and the documents that its ids refer to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from umarvel_ray.data.tables import Dataset, open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.index.faiss_index import Index, is_saved, make_index, open_index
from umarvel_ray.index.hits import Hit
from umarvel_ray.inference.embeddings import embedder_of, read_embeddings
from umarvel_ray.model.vectors import truncate_array
from umarvel_ray.recipe import Data


@dataclass(frozen=True)
class Corpus:
    """An index and the documents that its ids refer to."""

    index: Index
    dataset: Dataset

    @classmethod
    def open(cls, folder: str | Path, data: Data) -> Corpus:
        """Open a saved index, or build one from the embeddings of a finished embed job.

        Raises:
            UserError: `folder` holds neither, or it refers to documents that `data` does not contain.
        """
        index = open_index(folder) if is_saved(folder) else make_index(*read_embeddings(folder))
        dataset = open_dataset(data)
        unknown = next((id_ for id_ in index.ids if id_ not in dataset.row_of), None)
        if unknown is not None:
            raise UserError(
                f"{folder} holds document {unknown!r}, which {data.root} does not contain; embed the documents again"
            )
        return cls(index, dataset)

    def search(self, vector: np.ndarray, top_k: int) -> list[Hit]:
        """The best documents for one unit vector (d,), best first; a longer vector is truncated to the index's size."""
        [scores], [ids] = self.index.search(truncate_array(vector[None], self.index.dimension), top_k)
        rows = rows_of(self.dataset.documents, [self.dataset.row_of[id_] for id_ in ids])
        return [Hit(row, float(score)) for row, score in zip(rows, scores, strict=True)]


def made_with(folder: str | Path) -> str | None:
    """Identity of the checkpoint behind an index or a folder of embeddings; None if it is unknown.

    Raises: see `open_index`.
    """
    return open_index(folder).checkpoint if is_saved(folder) else embedder_of(folder)


def rows_of(table: pa.Table, rows: Iterable[int]) -> list[dict[str, Any]]:
    """A few rows as dicts. `take` would combine the chunks of each column and so copy every picture of the corpus."""
    return [table.slice(row, 1).to_pylist()[0] for row in rows]
