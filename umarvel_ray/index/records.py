"""What a commit of the live index holds: documents to add or replace, and ids to delete; as msgpack in the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import numpy as np

from umarvel_ray.errors import UserError

UNIT = 0.01  # how far a vector's norm may be from 1: half precision stays well within


@dataclass(frozen=True)
class Add:
    """A document and its unit vector, float32 (d,); it replaces the document of the same id."""

    id: str
    vector: np.ndarray
    modality: str
    source: str
    text: str | None = None
    image: bytes | None = None
    video: bytes | None = None

    @property
    def document(self) -> dict[str, Any]:
        """Its row, as in the documents table."""
        return {name: value for name, value in vars(self).items() if name != "vector"}


@dataclass(frozen=True)
class Delete:
    """No such document any more."""

    id: str


Record = Add | Delete


def encode(records: Sequence[Record], dimension: int) -> bytes:
    """One commit's payload.

    Raises:
        UserError: an id or text that is no Unicode text; a vector that is none of this dimension, or not a unit one.
    """
    try:
        return msgpack.packb([_packed(record, dimension) for record in records])
    except UnicodeEncodeError as error:
        raise UserError(f"{error.object[:60]!r} is no Unicode text (half of a surrogate pair); correct it") from None


def decode(payload: bytes) -> list[Record]:
    return [
        Add(**fields | {"vector": np.frombuffer(fields["vector"], "<f4")}) if "vector" in fields else Delete(**fields)
        for fields in msgpack.unpackb(payload)
    ]


def _packed(record: Record, dimension: int) -> dict[str, Any]:
    if isinstance(record, Delete):
        return asdict(record)
    vector = np.asarray(record.vector, "<f4")
    if vector.shape != (dimension,) or not abs(np.linalg.norm(vector) - 1) < UNIT:
        raise UserError(
            f"document {record.id!r}: expected a unit vector of shape ({dimension},), got shape {vector.shape} and "
            f"norm {np.linalg.norm(vector):.3f}; embed it with the index's own model"
        )
    return record.document | {"vector": vector.tobytes()}
