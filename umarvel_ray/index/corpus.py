"""A searchable corpus: an index, and the documents that its ids refer to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from umarvel_ray.data.content import KEY_COLUMNS
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.index.faiss_index import Index, is_saved, make_index, open_index
from umarvel_ray.index.hits import Hit
from umarvel_ray.inference.embeddings import embedder_of, read_embeddings
from umarvel_ray.model.vectors import truncate_array
from umarvel_ray.recipe import Data


@dataclass(frozen=True)
class Corpus:
    """An index and the documents that its ids refer to; `rows` are the documents of the ids, by number."""

    index: Index
    documents: StoredTable
    rows: np.ndarray

    @classmethod
    def open(cls, folder: str | Path, data: Data, cache: str | Path | None = None) -> Corpus:
        """Open a saved index, or build one from the embeddings of a finished embed job.

        Args:
            cache: see `open_dataset`.

        Raises:
            UserError: `folder` holds neither, or it refers to documents that `data` does not contain.
        """
        index = open_index(folder) if is_saved(folder) else make_index(*read_embeddings(folder))
        documents = open_dataset(data, cache).documents
        return cls(index, documents, rows_of(pa.array(index.ids, pa.string()), documents, folder, data))

    def search(self, vector: np.ndarray, top_k: int) -> list[Hit]:
        """The best documents for one unit vector (d,), best first; a longer vector is truncated to the index's size."""
        [scores], [found] = self.index.search_rows(truncate_array(vector[None], self.index.dimension), top_k)
        return [Hit(document, float(score)) for document, score in zip(self.read(found), scores, strict=True)]

    def read(self, found: np.ndarray) -> list[dict[str, Any]]:
        """The documents at rows of the index."""
        columns = [name for name in self.documents.schema.names if name not in KEY_COLUMNS]
        return self.documents.rows(self.rows[found], columns)


def rows_of(ids: pa.Array | pa.ChunkedArray, documents: StoredTable, folder: str | Path, data: Data) -> np.ndarray:
    """The row of each embedded document in the table of `data`, int64 (n,).

    Raises:
        UserError: `folder` refers to documents that `data` does not contain.
    """
    rows = documents.find(ids)
    if (unknown := np.flatnonzero(rows < 0)).size:
        raise UserError(
            f"{folder} holds document {ids[int(unknown[0])].as_py()!r}, which {data.root} does not contain; "
            "embed the documents again"
        )
    return rows


def made_with(folder: str | Path) -> str | None:
    """Identity of the checkpoint behind an index or a folder of embeddings; None if it is unknown.

    Raises: see `open_index`.
    """
    return open_index(folder).checkpoint if is_saved(folder) else embedder_of(folder)
