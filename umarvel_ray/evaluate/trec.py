"""TREC run files: lines of `query Q0 document rank score tag`, readable by trec_eval, ir_measures and pyserini.

White space, which separates the columns, is percent-encoded in ids, and so is "%": `urllib.parse.unquote` reverses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.files import atomic_path
from umarvel_ray.ragged import Ragged
from umarvel_ray.retrieve.metrics import ranks_in

QUERIES = 1024  # whose lines are in memory at once
SPECIAL = re.compile(r"[\s%]")


def write_run(path: Path, ranking: pa.Table, query_ids: pa.Array, document_ids: pa.Array, tag: str) -> None:
    """Write a ranking (columns of retrieve.rank.RANKING) atomically.

    Args:
        query_ids, document_ids: of all rows of the two tables.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        for start in range(0, ranking.num_rows, QUERIES):
            part = ranking.slice(start, QUERIES)
            documents = Ragged.of_arrow(part["documents"])
            queries = _escaped(query_ids, part["query"].combine_chunks())
            found = _escaped(document_ids, pa.array(documents.values))
            file.writelines(_lines(queries, documents, found, pc.list_flatten(part["scores"]).to_pylist(), tag))


def _lines(queries: list[str], documents: Ragged, found: list[str], scores: list[float], tag: str) -> Iterator[str]:
    owners = (queries[row] for row in documents.owners.tolist())
    ranks = (ranks_in(documents) + 1).tolist()
    return map("{} Q0 {} {} {:.6f} {}\n".format, owners, found, ranks, scores, repeat(tag))


def _escaped(ids: pa.Array, rows: pa.Array) -> list[str]:
    return [SPECIAL.sub(lambda found: quote(found[0]), id_) for id_ in ids.take(rows).to_pylist()]
