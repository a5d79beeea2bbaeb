"""What the filters have to know about documents: which have equal content, and which answer a query unlisted."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.data.dataset import Dataset, Queries
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.ragged import Ragged, RowsByKey

UNKNOWN = -1


class Documents:
    """Columns of the document table as numbers.

    Attributes:
        content: int64 (m,), equal for documents with the same text and pictures.
    """

    def __init__(self, dataset: Dataset, queries: Queries) -> None:
        table = dataset.documents
        self.content = np.unique(table.column("content_key").to_numpy(), return_inverse=True)[1]
        self._with_content = RowsByKey(self.content, np.arange(table.num_rows))
        self._modality = _codes(table, "modality", None)
        self._image = _code_of(table, "modality", "image")
        self._concept = _codes(table, "concept", None) if "concept" in table.schema.names else None
        if self._concept is not None and "concept" in queries.table.schema.names:
            self._asked = _codes(queries.table, "concept", table)[queries.rows]
        else:
            self._asked = np.full(queries.n, UNKNOWN)
        modality = queries.table.column("modality").combine_chunks()
        self._composed = pc.equal(modality, "image,text").fill_null(False).to_numpy(zero_copy_only=False)[queries.rows]

    def twins(self, positives: Ragged) -> list[set[int]]:
        """For each query, its positives and all documents with the same content as one of them."""
        same = self._with_content.having(self.content[positives.values])
        found: list[set[int]] = [set() for _ in range(positives.n)]
        for owner, rows in zip(positives.owners.tolist(), same.lists(), strict=True):
            found[owner].update(rows.tolist())
        return found

    def false_negatives(self, candidates: Ragged, at: np.ndarray, positives: Ragged) -> np.ndarray:
        """bool (m,): candidates that answer their query without being listed, judged by the optional `concept` column.

        They do if they show the query's concept in the modality of a positive. Not counted are queries that ask for a
        changed picture (image and text in, image out), because the unchanged concept does not answer them.

        Args:
            at: positions of the candidates' queries.
        """
        if self._concept is None:
            return np.zeros(len(candidates.values), bool)
        owners, documents = candidates.owners, candidates.values
        concept = self._asked[at][owners]
        gold_modality = Ragged(positives.offsets, self._modality[positives.values])
        others = gold_modality.keep(gold_modality.values != self._image).counts
        asks_for_change = self._composed[at] & (others == 0)
        answers: np.ndarray = (
            (concept != UNKNOWN)
            & (self._concept[documents] == concept)
            & gold_modality.contains_pairs(owners, self._modality[documents])
            & ~asks_for_change[owners]
            & ~positives.contains_pairs(owners, documents)
        )
        return answers


def _codes(table: StoredTable, column: str, among: StoredTable | None) -> np.ndarray:
    """Numbers of a column's values among the distinct values of a table; UNKNOWN for null and for any other value."""
    values = _distinct(among or table, column)
    codes: np.ndarray = pc.index_in(table.column(column), value_set=values).fill_null(UNKNOWN).to_numpy()
    return codes.astype(np.int64)


def _code_of(table: StoredTable, column: str, value: str) -> int:
    return int(pc.index(_distinct(table, column), value).as_py())


def _distinct(table: StoredTable, column: str) -> pa.Array:
    return table.column(column).unique().drop_null()
