"""What the routes call: items from clients in; vectors, scores and hits out. Each ingress replica has one.

Items become token ids and patches here, on a CPU, so that model replicas only run models. An item that cannot be used
becomes a `BadItem` at its position; whether the others are still processed is the client's choice (`require_good`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter

from umarvel_ray.data.content import MEDIA
from umarvel_ray.data.instructions import SPLITS, Instruction, instructions_of
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.index.hits import RERANK_DEPTH, Hit, fuse_hits
from umarvel_ray.index.labels import Filters
from umarvel_ray.index.records import Add, Delete, Record
from umarvel_ray.index.writer import Committed
from umarvel_ray.items.encoder import EncodedItem, ItemEncoder
from umarvel_ray.items.limits import MediaLimits
from umarvel_ray.items.pair_encoder import EncodedPair, PairEncoder
from umarvel_ray.items.pictures import Picture, PictureFormat
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.recipe import Data
from umarvel_ray.serving.access_log import location, log
from umarvel_ray.serving.cache import Embedded, content_key, embedding_cache
from umarvel_ray.serving.corpus import Behind, IndexState
from umarvel_ray.serving.decoders import Decoders
from umarvel_ray.serving.errors import BadItem, NotSeen, NotServed
from umarvel_ray.serving.items import Item, characters, library_item, place, remote_images
from umarvel_ray.serving.remote import RemotePictures
from umarvel_ray.serving.remote_model import ModelVersion, RemoteModel, RetryBudget, call_deployment
from umarvel_ray.serving.settings import Service

# What the models get in one call, so that other requests have their turn and no message is over the limit of gRPC.
CALL_PAIRS, CALL_ITEMS, CALL_BYTES = 64, 256, 2**26
# How long a search waits for the commit in `after`. The wait between two looks grows: many searches that look often
# would take time from everyone else's.
AFTER_S, AFTER_STEP_S, AFTER_GROWTH, AFTER_LONGEST_S = 10, 0.05, 1.25, 0.5
LIGHT_TEXT = 2000  # characters; tokenizing fewer takes less time than handing them to a thread and back

T = TypeVar("T")


@dataclass(frozen=True)
class ReadItem:
    """An item as the library takes it, and its place in the request body."""

    item: dict[str, Any]
    where: str
    index: int | None


Undecoded = ReadItem | BadItem | None


class Scored(NamedTuple):
    """P(yes) of a pair, and its tokens."""

    p_yes: float
    tokens: int


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
        self._data = service.data if service.index else None
        self._instructions: list[Instruction] | None = None
        self._rerank_weight = service.rerank_weight
        self._cache = embedding_cache(service.cache_mb * 2**20)
        self._remote = RemotePictures(service.limits)
        self._decoders = Decoders(service.limits)
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
            BadItem: too many items, characters or URLs.
        """
        limits = self.limits
        if isinstance(given, list) and len(given) > limits.max_items:
            raise BadItem(f"{name}: {len(given)} items; send at most {limits.max_items} at a time", name)

        def read_one(index: int | None, item: str | Item) -> ReadItem:
            where = place(name, index)
            return ReadItem(library_item(item, where, index, limits, fetched), where, index)

        indexed: list[tuple[int | None, str | Item]] = (
            list(enumerate(given)) if isinstance(given, list) else [(None, given)]
        )
        if sum(characters(item) for _, item in indexed) > limits.max_request_text:
            raise BadItem(f"{name}: over {limits.max_request_text} characters; send fewer texts at a time", name)
        urls = [url for _, item in indexed for url in remote_images(item, limits.max_images)]
        if len(urls) > limits.max_remote:
            raise BadItem(f"{name}: {len(urls)} URLs; send at most {limits.max_remote} at a time", name)
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
    ) -> list[Scored | BadItem]:
        """P(yes) for each document.

        Args:
            stored: the documents come from the index, so the limits on client data do not apply to them.

        Raises:
            BadItem: the query.
            NotServed: there is no reranker.
        """
        [scores] = await self.score_groups([(query, documents)], stored)
        return scores

    async def score_groups(
        self, groups: Sequence[tuple[ReadItem, Sequence[ReadItem | BadItem]]], stored: bool = False
    ) -> list[list[Scored | BadItem]]:
        """P(yes) of each query's documents; the reranker gets up to `CALL_PAIRS` pairs at a time.

        Args, raises: see `score`.
        """
        model = self.reranker

        async def work(version: ModelVersion[PairEncoders]) -> list[list[Scored | BadItem]]:
            encoders = version.encoder
            form = encoders.client.items.picture_format
            queries = await self._decoded([query for query, _ in groups], form)
            given = [one for _, documents in groups for one in documents]
            # The index's own documents were decoded when they came.
            sides = iter([(one, None) for one in given] if stored else await self._decoded(given, form))
            encode_document = (encoders.stored if stored else encoders.client).encode_document

            def prepare() -> list[tuple[EncodedPair | BadItem, list[EncodedPair | BadItem]]]:
                return [
                    (
                        _encode(encoders.client.encode_query, *query),
                        [_encode(encode_document, *next(sides)) for _ in documents],
                    )
                    for query, (_, documents) in zip(queries, groups, strict=True)
                ]

            prepared = await asyncio.to_thread(prepare)
            prompts = require_good([prompt for prompt, _ in prepared])
            pairs = [
                (prompt, side)
                for prompt, (_, sides) in zip(prompts, prepared, strict=True)
                for side in sides
                if not isinstance(side, BadItem)
            ]
            scored: list[Scored] = []
            for part in in_calls(pairs, [prompt.nbytes + side.nbytes for prompt, side in pairs], CALL_PAIRS):
                call = by_prompt(part)
                p_yes = await model.call(lambda handle, call=call: handle.score.remote(version.identity, call))
                lengths = [prompt.length + side.length for prompt, side in part]
                scored += map(Scored, p_yes, lengths)
            left = iter(scored)
            return [[side if isinstance(side, BadItem) else next(left) for side in sides] for _, sides in prepared]

        return await model.through_updates(work)

    async def search(
        self, query: ReadItem, top_k: int, rerank: bool, filters: Filters, after: int
    ) -> tuple[list[Hit], dict[str, float]]:
        """The corpus's `top_k` documents, best first, and the milliseconds that each part of the search took.

        The hits have no pictures and videos; see `with_media`.

        Raises:
            BadItem: the query.
            NotSeen: no replica has reached the commit `after` within `AFTER_S`.
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
            found = await until_seen(
                lambda: call_deployment(lambda: search.search.remote(*args), self._index_budget), after
            )
            return found, [start, encoded, time.perf_counter()]

        hits, times = await self.embedder.through_updates(work)
        if reranker:
            p_yes: list[float] = []
            async for part in self.with_media(hits):
                candidates = [ReadItem(hit.item, f"document {hit.document['id']}", None) for hit in part]
                p_yes += [one.p_yes for one in require_good(await self.score(query, candidates, stored=True))]
            hits = fuse_hits(hits, np.asarray(p_yes), self._rerank_weight)
        elapsed_ms = 1000 * np.diff([*times, time.perf_counter()])
        return hits[:top_k], dict(zip(("encode_ms", "retrieve_ms", "rerank_ms"), elapsed_ms.tolist(), strict=True))

    async def with_media(self, hits: Sequence[Hit]) -> AsyncIterator[list[Hit]]:
        """The hits with their documents whole, in parts of about `CALL_BYTES`; one deleted meanwhile stays as it is."""
        start = 0
        while start < len(hits):
            if not any(hit.has_media for hit in hits[start:]):
                yield list(hits[start:])
                return
            found = await self.documents([hit.document["id"] for hit in hits[start:]])
            part = hits[start : start + len(found)]
            yield [
                hit if document is None else replace(hit, document=document)
                for hit, document in zip(part, found, strict=True)
            ]
            start += len(found)

    async def documents(self, ids: Sequence[str]) -> list[dict[str, Any] | None]:
        """The first of the index's documents with these ids, whole, within `CALL_BYTES`. Raises: NotServed."""
        search = _require(self._search, "an index", "index")
        return await call_deployment(lambda: search.documents.remote(list(ids), CALL_BYTES), self._index_budget)

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

    async def instructions(self) -> list[Instruction]:
        """What the queries of the served data ask for; none if it has none."""
        if self._instructions is None:
            self._instructions = await asyncio.to_thread(_instructions, self._data) if self._data else []
        return self._instructions

    async def index_state(self) -> IndexState:
        """The index as one replica sees it. Raises: NotServed."""
        search = _require(self._search, "an index", "index")
        return await call_deployment(lambda: search.state.remote(), self._index_budget)

    @property
    def writable(self) -> bool:
        return self._writer is not None

    def _require_writer(self) -> DeploymentHandle:
        return _require(self._writer, "a folder for new documents", "live")

    async def _commit(self, version: ModelVersion[ItemEncoder], records: list[Record]) -> Committed:
        # A retry after the writer died may repeat a commit that is already on disk; that leaves the index the same.
        writer = self._require_writer()
        return await call_deployment(lambda: writer.commit.remote(version.identity, records), self._index_budget)

    async def _decoded(
        self, items: Sequence[Undecoded], form: PictureFormat
    ) -> list[tuple[Undecoded, tuple[Picture, ...] | None]]:
        """Items with their pictures, read in processes of their own; an item whose pictures are bad is bad."""
        budget = self._decoders.budget()

        async def decode(one: Undecoded) -> tuple[Undecoded, tuple[Picture, ...] | None]:
            if not isinstance(one, ReadItem):
                return one, None
            try:
                return one, await self._decoders.read(one.item, form, one.where, budget)
            except UserError as error:
                return BadItem(str(error), one.where, one.index), None
            except Exception as error:
                return _unforeseen(error, one), None

        async with asyncio.TaskGroup() as group:  # if the client leaves, all of them end
            tasks = [group.create_task(decode(one)) if _has_media(one) else None for one in items]
        return [(one, None) if task is None else task.result() for one, task in zip(items, tasks, strict=True)]

    async def _embed(
        self, version: ModelVersion[ItemEncoder], items: Sequence[ReadItem | BadItem], side: str
    ) -> list[Embedded | BadItem]:
        keys = [None if isinstance(one, BadItem) else content_key(version.identity, side, one.item) for one in items]
        cached = [None if key is None else self._cache.get(key) for key in keys]

        unknown = [None if known is not None else one for known, one in zip(cached, items, strict=True)]
        decoded = await self._decoded(unknown, version.encoder.picture_format)

        def encode(item: dict[str, Any], where: str, pictures: tuple[Picture, ...] | None) -> EncodedItem:
            return version.encoder.encode(item, side, where, pictures)

        def prepare(
            known: Embedded | None, one: ReadItem | BadItem | None, pictures: tuple[Picture, ...] | None
        ) -> Embedded | EncodedItem | BadItem:
            if known is not None:
                return known
            assert one is not None
            return _encode(encode, one, pictures)

        calls = [partial(prepare, known, *one) for known, one in zip(cached, decoded, strict=True)]
        prepared = await _run(calls, _is_light(items))
        new = [one for one in prepared if isinstance(one, EncodedItem)]
        for source, count in (("model", len(new)), ("cache", sum(isinstance(one, Embedded) for one in prepared))):
            if count:
                self._items.inc(count, {"source": source})
        found: list[np.ndarray] = []
        for call in in_calls(new, [one.nbytes for one in new], CALL_ITEMS):
            found += list(
                await self.embedder.call(lambda handle, call=call: handle.encode.remote(version.identity, call))
            )
        vectors = iter(found)
        embedded: list[Embedded | BadItem] = []
        for key, one in zip(keys, prepared, strict=True):
            if isinstance(one, EncodedItem):
                one = Embedded(next(vectors), one.length)
                if key is not None:
                    self._cache.put(key, one)
            embedded.append(one)
        return embedded


def in_calls(items: Sequence[T], sizes: Sequence[int], most: int) -> Iterator[Sequence[T]]:
    """Consecutive parts of at most `most` items and, unless a single one is larger, `CALL_BYTES`."""
    start = held = 0
    for number, size in enumerate(sizes):
        if number > start and (number - start == most or held + size > CALL_BYTES):
            yield items[start:number]
            start, held = number, 0
        held += size
    if start < len(items):
        yield items[start:]


def _instructions(data: str) -> list[Instruction]:
    with suppress(UserError):  # the search deployment reports what is wrong with the data
        dataset = open_dataset(Data(root=data))
        for split in SPLITS:
            with suppress(UserError):  # a folder may have documents only
                return instructions_of(dataset, split)
    return []


async def until_seen(look: Callable[[], Awaitable[list[Hit] | Behind]], after: int) -> list[Hit]:
    """What `look` finds once its replica has reached the commit `after`. Raises: NotSeen, after `AFTER_S`."""
    start, step = time.perf_counter(), AFTER_STEP_S
    while isinstance(found := await look(), Behind):
        left = AFTER_S - (time.perf_counter() - start)
        if left <= 0:
            raise NotSeen(after, found.sequence)
        await asyncio.sleep(min(step, left))
        step = min(step * AFTER_GROWTH, AFTER_LONGEST_S)
    return found


def by_prompt(pairs: Sequence[tuple[EncodedPair, EncodedPair]]) -> list[tuple[EncodedPair, list[EncodedPair]]]:
    """Pairs of a prompt and a document, with the documents of one prompt that follow one another together."""
    return [
        (prompts[0], list(documents))
        for prompts, documents in (zip(*group, strict=True) for _, group in groupby(pairs, lambda pair: id(pair[0])))
    ]


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


def _has_media(one: Undecoded) -> bool:
    return isinstance(one, ReadItem) and any(key in one.item for key in MEDIA)


def _encode(encode: Callable[..., T], one: ReadItem | BadItem, pictures: tuple[Picture, ...] | None) -> T | BadItem:
    if isinstance(one, BadItem):
        return one
    try:
        return encode(one.item, one.where, pictures)
    except UserError as error:
        return BadItem(str(error), one.where, one.index)
    except Exception as error:  # one item that nobody foresaw is no reason to fail the others
        return _unforeseen(error, one)


def _unforeseen(error: Exception, one: ReadItem) -> BadItem:
    log(None, event="error", **location(error))
    return BadItem(f"{one.where}: cannot be read ({type(error).__name__})", one.where, one.index)


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
