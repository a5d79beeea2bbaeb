"""Documents in Qdrant: one collection, with a point for each document and one point of state that has no vector.

The id of a point is a UUID of the document's id. Its payload has id, text, modality, source, metadata, digest, media
(base64 of msgpack) and labels, each as JSON of its name and value, so that one index serves every filter. Qdrant has no
transactions: the documents of a commit appear one request after the other, and its number last.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from umarvel_ray.errors import UserError
from umarvel_ray.index.hits import Hit
from umarvel_ray.index.labels import Filters, Value
from umarvel_ray.index.log import NoSpace
from umarvel_ray.index.records import Add, Record
from umarvel_ray.index.store import (
    FORMAT,
    LEAST_CANDIDATES,
    Unreachable,
    check_model,
    digest_of,
    media_of,
    packed_media,
    settle,
)
from umarvel_ray.index.writer import Committed
from umarvel_ray.items.images import pictures_of

TIMEOUT_S = 30
REQUEST_BYTES = 16 << 20  # Qdrant takes 32 MiB at a time
NUMBER_BYTES = 22  # of a coordinate as JSON
NAMESPACE = uuid.UUID("8f8e2a0c-58a5-4bb5-8b3f-0b1c7d4f6f0e")
VECTOR = "vector"  # with a name, points may lack it
SHOWN = ("id", "text", "modality", "source", "metadata")

Result = TypeVar("Result")


class QdrantStore:
    """See `Store`. The collection is created if it does not exist.

    Args:
        client: of the server, from `connect`; the caller's own in tests.
        identity: of the checkpoint (see `CheckpointRef`).
        dimension: of a new collection, and the most that an existing one may have.
        exact: whether to compare the query with every vector that the filters allow; otherwise Qdrant's HNSW index is
            used.

    Raises:
        Unreachable: the server does not respond.
        UserError: a collection of something else or of another model, or the key is refused.
    """

    def __init__(
        self, client: QdrantClient, collection: str, identity: str, dimension: int, exact: bool = True
    ) -> None:
        self._client, self._name, self._exact = client, collection, exact
        self._where = f"store: the collection {collection}"
        if not self._run(lambda: client.collection_exists(collection)):
            self._run(lambda: self._create(identity, dimension))
        state = self._state
        vectors = self._run(lambda: client.get_collection(collection)).config.params.vectors
        if not state or not isinstance(vectors, dict):
            raise UserError(f"{self._where} is not one of documents; name another one")
        self.dimension = check_model(
            self._where, (state["format"], state["identity"], vectors[VECTOR].size), identity, dimension
        )

    @property
    def sequence(self) -> int:
        """See `Searchable`."""
        return int(self._state["sequence"])

    def __len__(self) -> int:
        return self._run(lambda: self._client.count(self._name, exact=True)).count - 1

    def search(self, vector: np.ndarray, top_k: int, *, filters: Filters | None = None) -> list[Hit]:
        """See `Searchable`."""
        conditions: list[models.Condition] = [
            models.FieldCondition(key="labels", match=models.MatchAny(any=[_label(name, value) for value in values]))
            for name, values in (filters or {}).items()
        ]
        candidates = max(top_k, LEAST_CANDIDATES)
        found = self._run(
            lambda: self._client.query_points(
                self._name,
                query=vector.tolist(),
                using=VECTOR,
                limit=top_k,
                query_filter=models.Filter(must=conditions),
                search_params=models.SearchParams(exact=self._exact, hnsw_ef=candidates),
                with_payload=[*SHOWN, "pictures"],
            )
        )
        payloads = [(point.payload or {}, point.score) for point in found.points]
        return [Hit(_document(payload), score, pictures=payload["pictures"]) for payload, score in payloads]

    def documents(self, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """See `Searchable`."""
        found = {
            one["id"]: _document(one) | media_of(base64.b64decode(one["media"]) if one["media"] else None)
            for one in self._payloads(ids, [*SHOWN, "media"])
        }
        return [found.get(id_) for id_ in ids]

    def digests(self, ids: Sequence[str]) -> dict[str, str]:
        """See `Store`."""
        return {one["id"]: one["digest"] for one in self._payloads(ids, ["id", "digest"])}

    def commit(self, records: Sequence[Record]) -> Committed:
        """See `Store`. After an error some of the documents may be there; the same commit again completes it."""
        digests = {one.id: digest_of(one, self.dimension) for one in records if isinstance(one, Add)}
        state = self._state
        if not records:
            return Committed(state["sequence"], [])
        change = settle(records, self.digests([record.id for record in records]))
        for points in _requests(_point(one, digests[one.id]) for one in change.put):
            self._run(partial(self._client.upsert, self._name, points, wait=True))
        if change.deleted:
            gone = models.PointIdsList(points=[_uuid(id_) for id_ in change.deleted])
            self._run(lambda: self._client.delete(self._name, gone, wait=True))
        sequence = state["sequence"] + 1
        self._run(lambda: self._put_state(state | {"sequence": sequence}))
        return Committed(sequence, change.existed)

    def close(self) -> None:
        """See `Store`."""
        self._client.close()

    @property
    def _state(self) -> dict[str, Any]:
        """The payload of the point of state; empty if there is none."""
        found = self._run(lambda: self._client.retrieve(self._name, [_uuid("")]))
        return (found[0].payload or {}) if found else {}

    def _put_state(self, state: dict[str, Any]) -> None:
        older = models.FieldCondition(key="sequence", range=models.Range(lt=state["sequence"]))
        point = models.PointStruct(id=_uuid(""), vector={}, payload=state)
        # Another process may have written a later number meanwhile, which must not be undone.
        self._client.upsert(self._name, [point], wait=True, update_filter=models.Filter(must=[older]))

    def _create(self, identity: str, dimension: int) -> None:
        vectors = {VECTOR: models.VectorParams(size=dimension, distance=models.Distance.DOT)}
        try:
            self._client.create_collection(self._name, vectors_config=vectors, on_disk_payload=True)
        except UnexpectedResponse as error:
            if error.status_code != 409:  # of another process that was faster
                raise
        self._client.create_payload_index(self._name, "labels", models.PayloadSchemaType.KEYWORD)
        self._put_state({"format": FORMAT, "identity": identity, "sequence": 0})

    def _payloads(self, ids: Sequence[str], columns: list[str]) -> list[dict[str, Any]]:
        points = self._run(lambda: self._client.retrieve(self._name, [_uuid(id_) for id_ in ids], with_payload=columns))
        return [point.payload or {} for point in points]

    def _run(self, work: Callable[[], Result]) -> Result:
        """Do work; once more if the connection was lost. All of it may be repeated."""
        for again in (True, False):
            try:
                return work()
            except ResponseHandlingException as error:
                if not again:
                    raise Unreachable(f"store: Qdrant does not respond: {type(error.source).__name__}") from None
            except UnexpectedResponse as error:
                raise _refusal(self._where, error) from None
        raise AssertionError


def connect(url: str, api_key: str | None) -> QdrantClient:
    """A client of a server, such as http://localhost:6333; the port is 6333 unless the URL has one.

    Raises:
        UserError: a malformed URL.
    """
    try:
        return QdrantClient(url=url, api_key=api_key, timeout=TIMEOUT_S, check_compatibility=False)
    except ValueError:
        raise UserError("store: the url is not one of Qdrant; write https://HOST:6333") from None


def _refusal(where: str, error: UnexpectedResponse) -> UserError:
    """What a response with a status other than 2xx means."""
    status, content = error.status_code or 0, error.content.decode(errors="replace")
    if "No space left" in content:
        return NoSpace(f"{where}: Qdrant's disk is full; free space")
    if status in (401, 403):
        return UserError(f"{where}: Qdrant refuses the key; set UMARVEL_STORE_API_KEY")
    if status >= 500 or status == 429:
        return Unreachable(f"store: Qdrant does not respond: status {status}")
    return UserError(f"{where}: Qdrant refuses with status {status}: {' '.join(content.split())[:200]}")


def _uuid(id_: str) -> str:
    """The id of a document's point; of "" for the point of state, which no document has."""
    return str(uuid.uuid5(NAMESPACE, id_))


def _label(name: str, value: Value) -> str:
    return json.dumps([name, value], ensure_ascii=False)


def _document(payload: dict[str, Any]) -> dict[str, Any]:
    return {name: payload[name] for name in SHOWN}


def _point(document: Add, digest: str) -> models.PointStruct:
    media = packed_media(document)
    shown = {name: getattr(document, name) for name in SHOWN}
    payload = shown | {
        "metadata": dict(document.metadata),
        "labels": [_label(*label) for label in document.labels.items()],
        "digest": digest,
        "pictures": len(pictures_of(document.image)),
        "media": media and base64.b64encode(media).decode(),
    }
    return models.PointStruct(id=_uuid(document.id), vector={VECTOR: document.vector.tolist()}, payload=payload)


def _requests(points: Iterable[models.PointStruct]) -> Iterator[list[models.PointStruct]]:
    """Points in lists of about `REQUEST_BYTES` of JSON, or of one that is larger."""
    part: list[models.PointStruct] = []
    size = 0
    for point in points:
        payload, [vector] = point.payload or {}, point.vector.values()  # type: ignore[union-attr]
        own = len(payload["media"] or "") + len(payload["text"] or "") + NUMBER_BYTES * len(vector)  # type: ignore[arg-type]
        if part and size + own > REQUEST_BYTES:
            yield part
            part, size = [], 0
        part.append(point)
        size += own
    if part:
        yield part
