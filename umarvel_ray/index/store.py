"""The documents that a service searches: our own index, or an engine that runs elsewhere.

`Searchable` is what a search replica needs; `LiveIndex` is one. A `Store` is an engine's collection, which several
processes may read and change at a time (pgvector.py, qdrant.py). Both find the same documents in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import msgpack
import numpy as np

from umarvel_ray.data.content import MEDIA
from umarvel_ray.errors import UserError
from umarvel_ray.index.hits import Hit
from umarvel_ray.index.labels import Filters
from umarvel_ray.index.records import Add, Record, encode
from umarvel_ray.index.writer import Committed

FORMAT = 1
LEAST_CANDIDATES = 100  # that an approximate search considers, so that its first results are good


class Unreachable(UserError):
    """The engine does not respond."""


class Unstorable(UserError):
    """A document that the engine cannot hold; nothing was changed."""


class Searchable(Protocol):
    """Documents by id, each with a unit vector and labels. Thread-safe."""

    @property
    def sequence(self) -> int:
        """Number of the last commit that is visible to `search`."""

    def __len__(self) -> int:
        """Number of documents that `search` can find."""

    def search(self, vector: np.ndarray, top_k: int, *, filters: Filters | None = None) -> list[Hit]:
        """The `top_k` best documents (or all, if there are fewer) for one unit vector float32 (d,), best first.

        Args:
            filters: for each name, the values of which a document must have one.
        """

    def documents(self, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """The documents with these ids, whole; None for one that is not there."""


class Store(Searchable, Protocol):
    """A collection in an engine; the hits of `search` have no pictures and videos.

    Every method raises Unreachable if the engine does not respond, and UserError for what else it refuses.
    """

    dimension: int

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """`digest_of` each document with one of these ids, by id."""

    def commit(self, records: Sequence[Record]) -> Committed:
        """Apply additions, replacements and deletions in the given order; durable and searchable when this returns.

        Raises:
            NoSpace: the engine's disk is full.
            Unstorable: a document that this engine cannot hold.
            UserError: an invalid record.
        """

    def close(self) -> None:
        """Close the connections."""


class Change(NamedTuple):
    """What a commit does."""

    put: list[Add]  # each id once
    deleted: list[str]  # ids that were there
    existed: list[bool]  # of each record, whether a document with that id existed before
    growth: int  # documents after the commit, less those before


def settle(records: Sequence[Record], known: Collection[str]) -> Change:
    """What records do to a collection when they are applied in order.

    Args:
        known: which of the records' ids are there before.
    """
    there, existed = set(known), []
    for record in records:
        existed.append(record.id in there)
        (there.add if isinstance(record, Add) else there.discard)(record.id)
    last = {record.id: record for record in records}
    put = [record for record in last.values() if isinstance(record, Add)]
    return Change(put, [id_ for id_ in known if id_ not in there], existed, len(there) - len(known))


def digest_of(document: Add, dimension: int) -> str:
    """Equal for equal documents. Raises: UserError: see `encode`."""
    return hashlib.blake2b(encode([document], dimension), digest_size=16).hexdigest()


def check_model(where: str, found: tuple[int, str, int], identity: str, dimension: int) -> int:
    """The dimension of a collection that was there already.

    Args:
        where: names the collection in errors.
        found: its format, the identity of the checkpoint that embedded its documents, and its dimension.
        identity, dimension: of the checkpoint that is served, whose vectors may be truncated to fewer dimensions.

    Raises:
        UserError: it is in another format or from another model.
    """
    format_, theirs, size = found
    if format_ != FORMAT:
        raise UserError(f"{where} has format {format_}, not {FORMAT}; copy the documents to a new one")
    if theirs != identity or size > dimension:
        raise UserError(
            f"{where} was embedded with another model ({theirs[:12]}, dimension {size}, not {identity[:12]}, "
            f"{dimension}); serve that model, or name another one and copy the documents there"
        )
    return size


def packed_media(document: Add) -> bytes | None:
    """A document's pictures and video as msgpack; None if it has none."""
    media = [getattr(document, name) for name in MEDIA]
    return None if media == [None, None] else bytes(msgpack.packb(media))


def media_of(packed: bytes | None) -> dict[str, Any]:
    """The pictures and the video in what `packed_media` made, as columns of the document."""
    return dict(zip(MEDIA, msgpack.unpackb(packed) if packed else (None, None), strict=True))
