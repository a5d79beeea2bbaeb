"""The content of a commit to the live index: documents to add or replace, and ids to delete; msgpack in the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import numpy as np

from umarvel_ray.errors import UserError

UNIT_TOLERANCE = 0.01  # allowed deviation of a vector's norm from 1; half precision stays well within


@dataclass(frozen=True)
class Add:
    """Add a document with its unit vector, float32 (d,); it replaces any document with the same id."""

    id: str
    vector: np.ndarray
    modality: str
    source: str
    text: str | None = None
    image: bytes | None = None
    video: bytes | None = None

    @property
    def document(self) -> dict[str, Any]:
        """The document as a row of the documents table."""
        return {name: value for name, value in vars(self).items() if name != "vector"}


@dataclass(frozen=True)
class Delete:
    """Delete the document with this id, if there is one."""

    id: str


Record = Add | Delete


def encode(records: Sequence[Record], dimension: int) -> bytes:
    """The payload of one commit.

    Raises:
        UserError: an id or text that is not valid Unicode, or a vector that is not a unit vector of this dimension.
    """
    try:
        return msgpack.packb([_packed(record, dimension) for record in records])
    except UnicodeEncodeError as error:
        raise UserError(f"{error.object[:60]!r} is not valid Unicode (lone surrogate); correct the text") from None


def decode(payload: bytes) -> list[Record]:
    """The records of one commit."""
    return [
        Add(**fields | {"vector": np.frombuffer(fields["vector"], "<f4")}) if "vector" in fields else Delete(**fields)
        for fields in msgpack.unpackb(payload)
    ]


def _packed(record: Record, dimension: int) -> dict[str, Any]:
    if isinstance(record, Delete):
        return asdict(record)
    vector = np.asarray(record.vector, "<f4")
    if vector.shape != (dimension,) or not abs(np.linalg.norm(vector) - 1) < UNIT_TOLERANCE:
        raise UserError(
            f"document {record.id!r}: expected a unit vector of shape ({dimension},), got shape {vector.shape} and "
            f"norm {np.linalg.norm(vector):.3f}; embed it with the index's own model"
        )
    return record.document | {"vector": vector.tobytes()}
