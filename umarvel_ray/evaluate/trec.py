"""TREC run files: lines of `query Q0 document rank score tag`, readable by trec_eval, ir_measures and pyserini."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_path


def write_run(path: Path, rows: Iterable[tuple[str, Sequence[str], Sequence[float]]], tag: str) -> None:
    """Write (query id, document ids best first, scores) rows atomically.

    Raises:
        UserError: an id is empty or contains white space, which the format cannot represent.
    """
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        for query, documents, scores in rows:
            for rank, (document, score) in enumerate(zip(documents, scores, strict=True), start=1):
                if len(query.split()) != 1 or len(document.split()) != 1:
                    raise UserError(
                        f"run file {path}: id {query!r} or {document!r} is empty or contains white space; rename it"
                    )
                file.write(f"{query} Q0 {document} {rank} {score:.6f} {tag}\n")
