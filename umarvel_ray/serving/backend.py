"""What the routes ask for: clients' items in; vectors, scores and hits out. Each ingress replica has one.

Items become token ids and patches here, on a CPU, so that model replicas only run models. What is wrong with an item
stands in its place as a `BadItem`: whether the others are answered is the client's choice (`good`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
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
from umarvel_ray.serving.remote_model import Held, RemoteModel, RetryBudget, ask
from umarvel_ray.serving.settings import Service

LIGHT_TEXT = 2000  # characters: their tokens take less time than the way to a thread and back

Made = TypeVar("Made")


class Read(NamedTuple):
    """A library's item and its place in the client's body."""

    item: dict[str, Any]
    where: str
    index: int | None


class PairEncoders(NamedTuple):
    """The reranker's encoders of what clients send, and of the index's own documents."""

    given: PairEncoder
    stored: PairEncoder


class Backend:
    """The deployments behind the routes.

    Args:
        checkpoints: of the "embedder" and, where there is one, of the "reranker".
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
        return _part(self._reranker, "a reranker", "reranker")

    @property
    def models(self) -> list[RemoteModel]:
        return [model for model in (self.embedder, self._reranker) if model]

    async def read(self, given: str | Item | Sequence[str | Item], name: str) -> list[Read | BadItem]:
        """The library's item for a client's, or for each of a list; `name` is its key in the body.

        Raises:
            BadItem: too many items.
        """
        many = isinstance(given, list)
        if many and len(given) > self.limits.max_items:
            raise BadItem(f"{name}: {len(given)} items; send at most {self.limits.max_items} at a time", name)

        def read_one(index: int | None, item: str | Item) -> Read:
            where = place(name, index)
            return Read(library_item(item, where, index, self.limits, fetched), where, index)

        places = list(enumerate(given)) if many else [(None, given)]
        urls = [url for _, item in places for url in remote_images(item)]
        fetched = dict(zip(urls, await self._remote.fetch(urls), strict=True))
        light = all(isinstance(item, str) or not (item.image or item.video) for _, item in places)
        return await _beside(lambda: [_caught(read_one, *one) for one in places], light)

    async def embed(self, items: Sequence[Read | BadItem], side: str) -> list[Embedded | BadItem]:
        """A vector for each item; from the cache where it has been asked before."""

        async def work(held: Held[ItemEncoder]) -> list[Embedded | BadItem]:
            return await self._embed(held, items, side)

        return await self.embedder.through_updates(work)

    async def score(
        self, query: Read, documents: Sequence[Read | BadItem], stored: bool = False
    ) -> list[float | BadItem]:
        """P(yes) for each document.

        Args:
            stored: the documents are the index's own: the limits on what clients send do not hold for them.

        Raises:
            BadItem: the query.
            NotServed: without a reranker.
        """
        model = self.reranker

        async def work(held: Held[PairEncoders]) -> list[float | BadItem]:
            given, own = held.encoder

            def prepare() -> list:
                sides = [_made((own if stored else given).encode_document, document) for document in documents]
                return [_made(given.encode_query, query), *sides]

            prompt, *sides = await asyncio.to_thread(prepare)
            good([prompt])
            asked = [side for side in sides if not isinstance(side, BadItem)]
            scores = iter(await model.ask(lambda handle: handle.score.remote(held.identity, prompt, asked)))
            return [side if isinstance(side, BadItem) else float(next(scores)) for side in sides]

        return await model.through_updates(work)

    async def search(
        self, query: Read | BadItem, top_k: int, rerank: bool, filters: dict[str, list[str]], after: int
    ) -> tuple[list[Hit], dict[str, float]]:
        """The corpus' best documents, best first, and the milliseconds that each step took.

        Raises:
            BadItem: the query.
            NotServed: without an index, or a reranker to `rerank` with.
        """
        search = _part(self._search, "an index", "index")
        reranker = self.reranker if rerank else None
        depth = max(top_k, RERANK_DEPTH) if reranker else top_k

        async def work(held: Held[ItemEncoder]) -> tuple[list[Hit], list[float]]:
            start = time.perf_counter()
            [embedded] = good(await self._embed(held, [query], "query"))
            encoded = time.perf_counter()
            asked = held.identity, embedded.vector, depth, filters, after
            hits = await ask(lambda: search.search.remote(*asked), self._index_budget)
            return hits, [start, encoded, time.perf_counter()]

        hits, clock = await self.embedder.through_updates(work)
        if reranker:
            candidates = [Read(hit.item, f"document {hit.document['id']}", None) for hit in hits]
            hits = fuse_hits(
                hits, np.asarray(good(await self.score(query, candidates, stored=True))), self._rerank_weight
            )
        took = 1000 * np.diff([*clock, time.perf_counter()])
        return hits[:top_k], dict(zip(("encode_ms", "retrieve_ms", "rerank_ms"), took.tolist(), strict=True))

    async def add(
        self, documents: Sequence[Read | BadItem], record: Callable[[int, dict[str, Any], np.ndarray], Add], skip: bool
    ) -> tuple[list[Embedded | BadItem], Committed]:
        """Embed documents and commit the `record` of each; with `skip`, without the bad ones.

        Raises:
            BadItem: the first bad one, unless it is to be skipped.
            NotServed: nothing can be written.
        """

        async def work(held: Held[ItemEncoder]) -> tuple[list[Embedded | BadItem], Committed]:
            embedded = await self._embed(held, documents, "document")
            kept = [
                (at, one) for at, one in enumerate(embedded if skip else good(embedded)) if isinstance(one, Embedded)
            ]
            return embedded, await self._commit(held, [record(at, documents[at].item, one.vector) for at, one in kept])

        _part(self._writer, "a folder for new documents", "live")
        return await self.embedder.through_updates(work)

    async def delete(self, ids: Sequence[str]) -> Committed:
        """Raises: NotServed: nothing can be written."""
        _part(self._writer, "a folder for new documents", "live")
        return await self.embedder.through_updates(lambda held: self._commit(held, [Delete(id_) for id_ in ids]))

    async def index_size(self) -> tuple[int, int]:
        """Documents, and the last commit's number, as a replica sees them. Raises: NotServed."""
        search = _part(self._search, "an index", "index")
        return await ask(lambda: search.size.remote(), self._index_budget)

    @property
    def writable(self) -> bool:
        return self._writer is not None

    async def _commit(self, held: Held, records: list[Record]) -> Committed:
        # A commit that is asked again after its writer died may be there already: then it is there twice, alike.
        return await ask(lambda: self._writer.commit.remote(held.identity, records), self._index_budget)

    async def _embed(
        self, held: Held[ItemEncoder], items: Sequence[Read | BadItem], side: str
    ) -> list[Embedded | BadItem]:
        keys = [None if isinstance(read, BadItem) else content_key(held.identity, side, read.item) for read in items]
        known = [read if key is None else self._cache.get(key) for key, read in zip(keys, items, strict=True)]

        def encode(item: dict[str, Any], where: str) -> EncodedItem:
            return held.encoder.encode(item, side, where)

        def prepare() -> list[Embedded | EncodedItem | BadItem]:
            return [one or _made(encode, read) for one, read in zip(known, items, strict=True)]

        prepared = await _beside(prepare, _is_light(items))
        new = [one for one in prepared if isinstance(one, EncodedItem)]
        for source, count in (("model", len(new)), ("cache", sum(isinstance(one, Embedded) for one in prepared))):
            if count:
                self._items.inc(count, {"source": source})
        vectors = iter(await self.embedder.ask(lambda handle: handle.encode.remote(held.identity, new)) if new else ())
        for at, one in enumerate(prepared):
            if isinstance(one, EncodedItem):
                prepared[at] = Embedded(next(vectors), one.length)
                self._cache.put(keys[at], prepared[at])
        return prepared


async def _beside(work: Callable[[], Made], light: bool) -> Made:
    """Work in a thread, so that other requests go on; light work at once."""
    return work() if light else await asyncio.to_thread(work)


def _is_light(items: Sequence[Read | BadItem]) -> bool:
    given = [value for read in items if isinstance(read, Read) for value in read.item.values()]
    return all(isinstance(value, str) for value in given) and sum(map(len, given)) <= LIGHT_TEXT


def good(items: Sequence[Made | BadItem]) -> list[Made]:
    """The items, of which none may be bad.

    Raises:
        BadItem: the first that is.
    """
    for item in items:
        if isinstance(item, BadItem):
            raise item
    return list(items)


def _made(make: Callable[[dict[str, Any], str], Made], read: Read | BadItem) -> Made | BadItem:
    if isinstance(read, BadItem):
        return read
    try:
        return make(read.item, read.where)
    except UserError as error:
        return BadItem(str(error), read.where, read.index)


def _caught(make: Callable[..., Made], *given: Any) -> Made | BadItem:
    try:
        return make(*given)
    except BadItem as error:
        return error


def _part(part: Made | None, what: str, field: str) -> Made:
    if part is None:
        raise NotServed(f"this service runs without {what}; set UMARVEL_{field.upper()} or `{field}` in config.yaml")
    return part


def _item_encoder(media: MediaLimits, checkpoint: CheckpointRef) -> ItemEncoder:
    return ItemEncoder.from_pretrained(checkpoint.path, checkpoint.settings, media)


def _pair_encoders(media: MediaLimits, checkpoint: CheckpointRef) -> PairEncoders:
    settings = checkpoint.settings
    stored = ItemEncoder.from_pretrained(checkpoint.path, settings)
    given, own = (PairEncoder(items, settings.max_text_tokens) for items in (stored.within(media), stored))
    return PairEncoders(given, own)
