"""Equality by content: of documents, of their pictures, of whole tables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set

import pyarrow as pa


def picture_key(image: bytes | str | None) -> str | None:
    """What tells two stored pictures apart: the digest of the bytes, or the path."""
    return hashlib.sha1(image).hexdigest() if isinstance(image, bytes) else image


def content_key(row: dict) -> tuple[str | None, str | None]:
    """Equal for documents with the same text and the same picture."""
    return row.get("text"), picture_key(row.get("image"))


def own_pictures(query: dict, gold: Set[str], documents_with: Mapping[str, Sequence[str]]) -> list[str]:
    """Documents that show the query's own picture and are not its positives: finding them again answers nothing.

    Args:
        query: its row.
        documents_with: document ids by picture key.
    """
    key = picture_key(query.get("image"))
    return [id_ for id_ in documents_with.get(key, ()) if id_ not in gold] if key else []


def digest_of_table(table: pa.Table) -> str:
    """Equal for tables with the same columns and values, however they are chunked or sliced."""
    digest = hashlib.sha256(str(table.schema.remove_metadata()).encode())
    for batch in table.combine_chunks().to_batches(max_chunksize=65536):
        digest.update(batch.serialize())
    return digest.hexdigest()
