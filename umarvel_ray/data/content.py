"""Keys and digests that are equal for equal content: of pictures, documents and whole tables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import pyarrow as pa


def picture_key(image: bytes | str | None) -> str | None:
    """A stored picture's identity: the digest of its bytes, or its path."""
    return hashlib.sha1(image).hexdigest() if isinstance(image, bytes) else image


def content_key(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Equal for documents with the same text and the same picture."""
    return row.get("text"), picture_key(row.get("image"))


def own_pictures(query: Mapping[str, Any], gold: Set[str], documents_with: Mapping[str, Sequence[str]]) -> list[str]:
    """Documents that show the query's own picture but are not positives, and so are trivial matches.

    Args:
        query: a row of a query table.
        gold: ids of its positives.
        documents_with: document ids by picture key.
    """
    key = picture_key(query.get("image"))
    return [id_ for id_ in documents_with.get(key, ()) if id_ not in gold] if key else []


def digest_of_table(table: pa.Table) -> str:
    """Equal for tables with the same columns and values, regardless of chunks and slices."""
    digest = hashlib.sha256(str(table.schema.remove_metadata()).encode())
    for batch in table.combine_chunks().to_batches(max_chunksize=65536):
        digest.update(batch.serialize())
    return digest.hexdigest()
