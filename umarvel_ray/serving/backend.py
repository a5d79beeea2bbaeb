"""What the routes call: items from clients in; vectors, scores and hits out. Each ingress replica has one.

Items become token ids and patches here, on a CPU, so that model replicas only run models. An item that cannot be used
becomes a `BadItem` at its position; whether the others are still processed is the client's choice (`require_good`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter

from umarvel_ray.errors import UserError
from umarvel_ray.index.hits import RERANK_DEPTH, Hit, fuse_hits
from umarvel_ray.index.records import Add, Delete, Record
from umarvel_ray.index.writer import Committed
from umarvel_ray.items.encoder import EncodedItem, ItemEncoder
from umarvel_ray.items.limits import MediaLimits
from umarvel_ray.items.pair_encoder import PairEncoder
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.serving.cache import Embedded, content_key, embedding_cache
from umarvel_ray.serving.errors import BadItem, NotServed
from umarvel_ray.serving.items import Item, library_item, place, remote_images
from umarvel_ray.serving.remote import RemotePictures
from umarvel_ray.serving.remote_model import ModelVersion, RemoteModel, RetryBudget, call_deployment
from umarvel_ray.serving.settings import Service

LIGHT_TEXT = 2000  # characters; tokenizing fewer takes less time than handing them to a thread and back

T = TypeVar("T")


@dataclass(frozen=True)
class ReadItem:
    """An item as the library takes it, and its place in the request body."""

    item: dict[str, Any]
    where: str
    index: int | None


class PairEncoders(NamedTuple):
    """The reranker's encoders, for items from clients and for the index's own documents."""

    client: PairEncoder
    stored: PairEncoder


class Backend:
    """The deployments behind the routes.

    Args:
        checkpoints: of the "embedder" and, if there is one, of the "reranker".
    """

    def __init__(
        self,
        service: Service,
        checkpoints: dict[str, CheckpointRef],
        embedder: DeploymentHandle,
        reranker: DeploymentHandle | None,
        search: DeploymentHandle | None,
        writer: DeploymentHandle | None,
    ) -> None:
        self.limits = service.limits
        media = self.limits.media()
        self.embedder = RemoteModel(embedder, checkpoints["embedder"], partial(_item_encoder, media))
        pairs = partial(_pair_encoders, media)
        self._reranker = RemoteModel(reranker, checkpoints["reranker"], pairs) if reranker else None
        self._search, self._writer, self._index_budget = search, writer, RetryBudget()
        self._rerank_weight = service.rerank_weight
        self._cache = embedding_cache(service.cache_mb * 2**20)
        self._remote = RemotePictures(service.limits)
        self._items = Counter("umarvel_items", "items embedded, by where the vector came from", ("source",))

    @property
    def reranker(self) -> RemoteModel[PairEncoders]:
        """Raises: NotServed."""
        return _require(self._reranker, "a reranker", "reranker")

    @property
    def models(self) -> list[RemoteModel[Any]]:
        return [model for model in (self.embedder, self._reranker) if model]

    async def read(self, given: str | Item | list[str | Item], name: str) -> list[ReadItem | BadItem]:
        """Convert a client's item or list of items to library items; `name` is its key in the request body.

        Raises:
            BadItem: too many items.
        """
        if isinstance(given, list) and len(given) > self.limits.max_items:
            raise BadItem(f"{name}: {len(given)} items; send at most {self.limits.max_items} at a time", name)

        def read_one(index: int | None, item: str | Item) -> ReadItem:
            where = place(name, index)
            return ReadItem(library_item(item, where, index, self.limits, fetched), where, index)

        indexed: list[tuple[int | None, str | Item]] = (
            list(enumerate(given)) if isinstance(given, list) else [(None, given)]
        )
        urls = [url for _, item in indexed for url in remote_images(item)]
        fetched = dict(zip(urls, await self._remote.fetch(urls), strict=True))
        light = all(isinstance(item, str) or not (item.image or item.video) for _, item in indexed)
        return await _run([partial(_catch, read_one, *one) for one in indexed], light)

    async def embed(self, items: Sequence[ReadItem | BadItem], side: str) -> list[Embedded | BadItem]:
        """A vector per item, from the cache if the item has been embedded before."""

        async def work(version: ModelVersion[ItemEncoder]) -> list[Embedded | BadItem]:
            return await self._embed(version, items, side)

        return await self.embedder.through_updates(work)

    async def score(
        self, query: ReadItem, documents: Sequence[ReadItem | BadItem], stored: bool = False
    ) -> list[float | BadItem]:
        """P(yes) for each document.

        Args:
            stored: the documents come from the index, so the limits on client data do not apply to them.

        Raises:
            BadItem: the query.
            NotServed: there is no reranker.
        """
        model = self.reranker

        async def work(version: ModelVersion[PairEncoders]) -> list[float | BadItem]:
            encoders = version.encoder
            encode_document = (encoders.stored if stored else encoders.client).encode_document

            def prepare() -> list[Any]:
                sides = [_encode(encode_document, document) for document in documents]
                return [_encode(encoders.client.encode_query, query), *sides]

            prompt, *sides = await asyncio.to_thread(prepare)
            require_good([prompt])
            valid = [side for side in sides if not isinstance(side, BadItem)]
            scores = iter(await model.call(lambda handle: handle.score.remote(version.identity, prompt, valid)))
            return [side if isinstance(side, BadItem) else float(next(scores)) for side in sides]

        return await model.through_updates(work)

    async def search(
        self, query: ReadItem, top_k: int, rerank: bool, filters: dict[str, list[str] | None], after: int
    ) -> tuple[list[Hit], dict[str, float]]:
        """The corpus's `top_k` documents, best first, and the milliseconds that each part of the search took.

        Raises:
            BadItem: the query.
            NotServed: there is no index, or no reranker to `rerank` with.
        """
        search = _require(self._search, "an index", "index")
        reranker = self.reranker if rerank else None
        depth = max(top_k, RERANK_DEPTH) if reranker else top_k

        async def work(version: ModelVersion[ItemEncoder]) -> tuple[list[Hit], list[float]]:
            start = time.perf_counter()
            [embedded] = require_good(await self._embed(version, [query], "query"))
            encoded = time.perf_counter()
            args = version.identity, embedded.vector, depth, filters, after
            hits = await call_deployment(lambda: search.search.remote(*args), self._index_budget)
            return hits, [start, encoded, time.perf_counter()]

        hits, times = await self.embedder.through_updates(work)
        if reranker:
            candidates = [ReadItem(hit.item, f"document {hit.document['id']}", None) for hit in hits]
            p_yes = require_good(await self.score(query, candidates, stored=True))
            hits = fuse_hits(hits, np.asarray(p_yes), self._rerank_weight)
        elapsed_ms = 1000 * np.diff([*times, time.perf_counter()])
        return hits[:top_k], dict(zip(("encode_ms", "retrieve_ms", "rerank_ms"), elapsed_ms.tolist(), strict=True))

    async def add(
        self,
        documents: Sequence[ReadItem | BadItem],
        record: Callable[[int, dict[str, Any], np.ndarray], Add],
        skip: bool,
    ) -> tuple[list[Embedded | BadItem], Committed]:
        """Embed documents and commit the `record(position, item, vector)` of each; `skip` leaves bad ones out.

        Raises:
            BadItem: the first bad one, without `skip`.
            NotServed: the index is read-only.
        """

        async def work(version: ModelVersion[ItemEncoder]) -> tuple[list[Embedded | BadItem], Committed]:
            embedded = await self._embed(version, documents, "document")
            if not skip:
                require_good(embedded)
            records: list[Record] = [
                record(number, document.item, one.vector)
                for number, (document, one) in enumerate(zip(documents, embedded, strict=True))
                if isinstance(document, ReadItem) and isinstance(one, Embedded)
            ]
            return embedded, await self._commit(version, records)

        self._require_writer()
        return await self.embedder.through_updates(work)

    async def delete(self, ids: Sequence[str]) -> Committed:
        """Commit deletions. Raises: NotServed: the index is read-only."""
        self._require_writer()
        return await self.embedder.through_updates(lambda version: self._commit(version, [Delete(id_) for id_ in ids]))

    async def index_size(self) -> tuple[int, int]:
        """The number of documents and of the last commit, as one replica sees them. Raises: NotServed."""
        search = _require(self._search, "an index", "index")
        return await call_deployment(lambda: search.size.remote(), self._index_budget)

    @property
    def writable(self) -> bool:
        return self._writer is not None

    def _require_writer(self) -> DeploymentHandle:
        return _require(self._writer, "a folder for new documents", "live")

    async def _commit(self, version: ModelVersion[ItemEncoder], records: list[Record]) -> Committed:
        # A retry after the writer died may repeat a commit that is already on disk; that leaves the index the same.
        writer = self._require_writer()
        return await call_deployment(lambda: writer.commit.remote(version.identity, records), self._index_budget)

    async def _embed(
        self, version: ModelVersion[ItemEncoder], items: Sequence[ReadItem | BadItem], side: str
    ) -> list[Embedded | BadItem]:
        keys = [None if isinstance(one, BadItem) else content_key(version.identity, side, one.item) for one in items]
        cached = [None if key is None else self._cache.get(key) for key in keys]

        def encode(item: dict[str, Any], where: str) -> EncodedItem:
            return version.encoder.encode(item, side, where)

        def prepare(known: Embedded | None, one: ReadItem | BadItem) -> Embedded | EncodedItem | BadItem:
            return known if known is not None else _encode(encode, one)

        prepared = await _run([partial(prepare, *pair) for pair in zip(cached, items, strict=True)], _is_light(items))
        new = [one for one in prepared if isinstance(one, EncodedItem)]
        for source, count in (("model", len(new)), ("cache", sum(isinstance(one, Embedded) for one in prepared))):
            if count:
                self._items.inc(count, {"source": source})
        vectors = iter(
            await self.embedder.call(lambda handle: handle.encode.remote(version.identity, new)) if new else ()
        )
        embedded: list[Embedded | BadItem] = []
        for key, one in zip(keys, prepared, strict=True):
            if isinstance(one, EncodedItem):
                one = Embedded(next(vectors), one.length)
                if key is not None:
                    self._cache.put(key, one)
            embedded.append(one)
        return embedded


async def _run(calls: list[Callable[[], T]], light: bool) -> list[T]:
    """The results of calls: of light ones at once, of others in a thread, so that the event loop stays free."""

    def run() -> list[T]:
        return [call() for call in calls]

    return run() if light else await asyncio.to_thread(run)


def _is_light(items: Sequence[ReadItem | BadItem]) -> bool:
    values = [value for one in items if isinstance(one, ReadItem) for value in one.item.values()]
    return all(isinstance(value, str) for value in values) and sum(map(len, values)) <= LIGHT_TEXT


def require_good(items: Sequence[T | BadItem]) -> list[T]:
    """The items, if none is bad.

    Raises:
        BadItem: the first bad one.
    """
    good: list[T] = []
    for item in items:
        if isinstance(item, BadItem):
            raise item
        good.append(item)
    return good


def _encode(encode: Callable[[dict[str, Any], str], T], one: ReadItem | BadItem) -> T | BadItem:
    if isinstance(one, BadItem):
        return one
    try:
        return encode(one.item, one.where)
    except UserError as error:
        return BadItem(str(error), one.where, one.index)


def _catch(make: Callable[..., T], *args: Any) -> T | BadItem:
    try:
        return make(*args)
    except BadItem as error:
        return error


def _require(component: T | None, what: str, field: str) -> T:
    if component is None:
        raise NotServed(f"this service runs without {what}; set UMARVEL_{field.upper()} or `{field}` in config.yaml")
    return component


def _item_encoder(media: MediaLimits, checkpoint: CheckpointRef) -> ItemEncoder:
    return ItemEncoder.from_pretrained(checkpoint.path, checkpoint.settings, media)


def _pair_encoders(media: MediaLimits, checkpoint: CheckpointRef) -> PairEncoders:
    settings = checkpoint.settings
    stored = ItemEncoder.from_pretrained(checkpoint.path, settings)
    pairs = (PairEncoder(items, settings.max_text_tokens) for items in (stored.within(media), stored))
    return PairEncoders(*pairs)
