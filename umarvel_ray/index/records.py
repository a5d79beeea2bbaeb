"""The content of a commit to the live index: documents to add or replace, and ids to delete; msgpack in the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgpack
import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.index.labels import LABELS, NOT_LABELS, Value

Media = bytes | str | Sequence[bytes | str]  # encoded, a path, or several of these
UNIT_TOLERANCE = 0.01  # allowed deviation of a vector's norm from 1; half precision stays well within


@dataclass(frozen=True)
class Add:
    """Add a document with its unit vector, float32 (d,); it replaces any document with the same id.

    Args:
        image, video: bytes from clients; documents of a corpus may also have paths, or several pictures.
        metadata: further labels to filter by.
    """

    id: str
    vector: np.ndarray
    modality: str
    source: str
    text: str | None = None
    image: Media | None = None
    video: Media | None = None
    metadata: Mapping[str, Value] = field(default_factory=dict)

    @property
    def document(self) -> dict[str, Any]:
        """The document as a row of the documents table, with its metadata as one more column."""
        return {name: value for name, value in vars(self).items() if name != "vector"}

    @property
    def labels(self) -> dict[str, Value]:
        """What the document can be filtered by."""
        return {**self.metadata, "modality": self.modality, "source": self.source}


@dataclass(frozen=True)
class Delete:
    """Delete the document with this id, if there is one."""

    id: str


Record = Add | Delete


def encode(records: Sequence[Record], dimension: int) -> bytes:
    """The payload of one commit.

    Raises:
        UserError: an id or text that is not valid Unicode, metadata that cannot be filtered by, or a vector that is not
            a unit vector of this dimension.
    """
    try:
        return msgpack.packb([_packed(record, dimension) for record in records])
    except UnicodeEncodeError as error:
        raise UserError(f"{error.object[:60]!r} is not valid Unicode (lone surrogate); correct the text") from None


def decode(payload: bytes) -> Iterator[tuple[Record, slice]]:
    """The records of one commit, and where each one lies in the payload; see `decode_one`."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)  # 0: the largest that there is
    unpacker.feed(payload)
    for _ in range(unpacker.read_array_header()):
        start = unpacker.tell()
        record = _record(unpacker.unpack())
        yield record, slice(start, unpacker.tell())


def decode_one(data: bytes) -> Record:
    """The record that lies in this part of a payload."""
    return _record(msgpack.unpackb(data))


def _record(fields: dict[str, Any]) -> Record:
    if "vector" not in fields:
        return Delete(**fields)
    return Add(**fields | {"vector": np.frombuffer(fields["vector"], "<f4")})


def _packed(record: Record, dimension: int) -> dict[str, Any]:
    if isinstance(record, Delete):
        return asdict(record)
    vector = np.asarray(record.vector, "<f4")
    if vector.shape != (dimension,) or not abs(np.linalg.norm(vector) - 1) < UNIT_TOLERANCE:
        raise UserError(
            f"document {record.id!r}: expected a unit vector of shape ({dimension},), got shape {vector.shape} and "
            f"norm {np.linalg.norm(vector):.3f}; embed it with the index's own model"
        )
    for name, value in record.metadata.items():
        _check_label(record.id, name, value)
    packed = record.document | {"vector": vector.tobytes()}
    if not packed["metadata"]:
        del packed["metadata"]
    return packed


def _check_label(id_: str, name: str, value: Value) -> None:
    if name in (*LABELS, *NOT_LABELS):
        raise UserError(f"document {id_!r}: metadata cannot be called '{name}'; rename it")
    if type(value) not in (str, int) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        raise UserError(
            f"document {id_!r}: metadata '{name}' is {value!r}, which is neither a string nor a whole number of 64 bits"
        )
