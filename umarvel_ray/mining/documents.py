"""What the filters have to know about documents: which have equal content, and which answer a query unlisted."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.data.dataset import Dataset, Queries
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
        self._modality, modalities = table.codes("modality")
        self._image = modalities.index("image") if "image" in modalities else UNKNOWN
        self._concept, self._asked = None, np.full(queries.n, UNKNOWN)
        if "concept" in table.schema.names:
            self._concept, concepts = table.codes("concept")
            if "concept" in queries.table.schema.names:
                asked = pc.index_in(queries.table.column("concept"), value_set=pa.array(concepts, pa.string()))
                self._asked = asked.fill_null(UNKNOWN).to_numpy().astype(np.int64)[queries.rows]
        modality = queries.table.column("modality")
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
