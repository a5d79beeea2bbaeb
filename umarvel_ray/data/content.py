"""Keys that are equal for equal content, and digests of what a result was computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from umarvel_ray.ragged import Ragged

NO_PICTURE = 0
MEDIA = ("image", "video")

_NOTHING = bytes(8)
_PATH = {kind: f"{kind} path".encode() for kind in MEDIA}
_BYTES = {kind: f"{kind} bytes".encode() for kind in MEDIA}
KEY_COLUMNS = ("content_key", "picture_key")  # of a stored table, beside the user's own columns


def picture_key(row: Mapping[str, Any]) -> int:
    """Identity of a row's pictures and videos: a hash of their bytes or paths, as 64 bits; NO_PICTURE if none."""
    return int.from_bytes(_joined(*(_parts(row.get(kind), kind) for kind in MEDIA)), "little")


def content_key(row: Mapping[str, Any]) -> int:
    """Equal for documents with the same text, pictures and videos: 64 bits."""
    text = (row.get("text") or "").encode("utf-8", "surrogatepass")
    return int.from_bytes(_with_text(text, picture_key(row).to_bytes(8, "little")), "little")


def picture_keys(rows: pa.RecordBatch) -> np.ndarray:
    """`picture_key` of each row, uint64 (n,)."""
    media = [kind for kind in MEDIA if kind in rows.schema.names]
    parts = [map(partial(_parts, kind=kind), _values(rows[kind])) for kind in media]
    return _as_keys(map(_joined, *parts), rows.num_rows)


def keys_of_each(column: pa.ListArray, together: np.ndarray) -> Ragged:
    """The distinct keys under which a document may show pictures of each list: one of them alone, or all.

    Args:
        together: uint64 (n,), the picture key of each row.
    """
    rows = zip(column.to_pylist(), together.view(np.int64), strict=True)
    keys = [np.unique(np.append(np.frombuffer(_parts(shown, "image"), "<i8"), key)) for shown, key in rows]
    return Ragged.of_counts(np.fromiter(map(len, keys), np.int64), np.concatenate([np.empty(0, np.int64), *keys]))


def content_keys(rows: pa.RecordBatch, pictures: np.ndarray) -> np.ndarray:
    """`content_key` of each row, uint64 (n,), from its text and its picture key."""
    data = pictures.astype("<u8").tobytes()
    salts = (data[start : start + 8] for start in range(0, len(data), 8))
    texts = _bytes_of_strings(rows["text"])
    return _as_keys(map(_with_text, texts, salts), rows.num_rows)


def digest_of(*parts: str | bytes | np.ndarray | Mapping[str, Any]) -> str:
    """Equal for equal parts in the same order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else _bytes_of(part)
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.hexdigest()


def digest_of_table(table: pa.Table) -> str:
    """Equal for tables with the same columns and values, regardless of chunks and slices."""
    digest = hashlib.sha256(str(table.schema.remove_metadata()).encode())
    for batch in table.combine_chunks().to_batches(max_chunksize=65536):
        digest.update(batch.serialize())
    return digest.hexdigest()


def _bytes_of(part: str | np.ndarray | Mapping[str, Any]) -> Any:
    if isinstance(part, np.ndarray):
        return np.ascontiguousarray(part).view(np.uint8).data
    return (part if isinstance(part, str) else json.dumps(part)).encode()


def _parts(shown: Any, kind: str) -> bytes:
    """Eight bytes for each of a row's pictures or videos: paths, encoded bytes, or a list of either."""
    if not shown:
        return b""
    if isinstance(shown, list):
        return b"".join(_parts(part, kind) or _NOTHING for part in shown)
    if isinstance(shown, str):
        return _hash(shown.encode("utf-8", "surrogatepass"), person=_PATH[kind])
    return _hash(shown, person=_BYTES[kind])


def _joined(*parts: bytes) -> bytes:
    """One key from the parts of a row."""
    shown = b"".join(parts)
    return shown if len(shown) == len(_NOTHING) else _hash(shown) if shown else _NOTHING


def _with_text(text: bytes | None, picture: bytes) -> bytes:
    return _hash(text, salt=picture) if text else picture


def _hash(data: bytes, salt: bytes = b"", person: bytes = b"") -> bytes:
    return hashlib.blake2b(data, digest_size=8, salt=salt, person=person).digest()


def _as_keys(keys: Iterable[bytes], count: int) -> np.ndarray:
    return np.frombuffer(b"".join(keys), "<u8", count)


def _values(column: pa.Array) -> Any:
    """The rows of a column of pictures or videos as Python objects."""
    if pa.types.is_large_binary(column.type) or pa.types.is_large_string(column.type):
        return column.to_numpy(zero_copy_only=False)  # many times faster than to_pylist
    return column.to_pylist()


def _bytes_of_strings(column: pa.Array) -> Any:
    return column.cast(pa.binary()).to_numpy(zero_copy_only=False)
