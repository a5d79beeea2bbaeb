"""The deployments that hold documents: replicas of one live index and its only writer, or connections to a store."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from ray import serve

from umarvel_ray.errors import UserError
from umarvel_ray.index.corpus import Corpus
from umarvel_ray.index.hits import Hit, media_bytes
from umarvel_ray.index.labels import Filters
from umarvel_ray.index.live import LiveIndex
from umarvel_ray.index.records import Add, Record
from umarvel_ray.index.store import Searchable
from umarvel_ray.index.writer import Committed, IndexWriter, Locked
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.vectors import truncate_array
from umarvel_ray.recipe import Data
from umarvel_ray.serving.errors import Busy
from umarvel_ray.serving.follower import Follower
from umarvel_ray.serving.replicas import SingleThread, check_identity, slots_used
from umarvel_ray.serving.settings import Pgvector, Qdrant
from umarvel_ray.serving.store import dimension_of, open_store

COMMIT_SLOTS = 64
LOCK_REPORT_S = 60  # how often a writer says that it is still waiting for another one to exit

logger = logging.getLogger("ray.serve")


class Behind(NamedTuple):
    """What a replica answers that has not reached the commit that a search asked for."""

    sequence: int  # of the last commit it has read


class IndexState(NamedTuple):
    """The index as one replica sees it."""

    documents: int
    sequence: int  # of the last commit it has read
    behind_s: float  # since it last read the log to its end; 0 if the index is read-only


def open_base(checkpoint: CheckpointRef, index: str | None, data: str) -> tuple[Corpus | None, int]:
    """The base, if any, and the dimension of the index.

    Raises:
        UserError: see `Corpus.open`.
    """
    if index is None:
        return None, dimension_of(checkpoint)
    corpus = Corpus.open(index, Data(root=data))
    return corpus, corpus.index.dimension


class Searching:
    """What replicas of every kind of index answer."""

    def __init__(self, checkpoint: CheckpointRef, index: Searchable, dimension: int) -> None:
        self._checkpoint, self._index, self._dimension = checkpoint, index, dimension

    async def search(
        self, identity: str, vector: np.ndarray, top_k: int, filters: Filters, after: int
    ) -> list[Hit] | Behind:
        """The nearest documents that pass the filters, best first, without their pictures and videos.

        Args:
            vector: float32 (d,), unit norm.
            filters: see `LiveIndex.search`.
            after: number of a commit that the results must reflect.

        Raises:
            CheckpointMismatch: see `check_identity`.
            Unreachable: see `Store`.
        """
        check_identity(self._checkpoint, identity)
        vector = truncate_array(vector[None], self._dimension)[0]

        def work() -> list[Hit] | Behind:
            # Whoever waits does so in the ingress, where waiting takes nobody's place.
            if after and (sequence := self._index.sequence) < after:
                return Behind(sequence)
            return [hit.light for hit in self._index.search(vector, top_k, filters=filters)]

        return await asyncio.to_thread(work)

    async def documents(self, ids: list[str], max_bytes: int) -> list[dict[str, Any] | None]:
        """The first of the documents with these ids, whole: as many as `max_bytes` of media allow, at least one.

        None stands for one that is not there.
        """

        def work() -> list[dict[str, Any] | None]:
            found: list[dict[str, Any] | None] = []
            left = max_bytes
            for id_ in ids:
                [document] = self._index.documents([id_])
                left -= media_bytes(document) if document else 0
                if found and document and left < 0:
                    break
                found.append(document)
            return found

        return await asyncio.to_thread(work)

    @property
    def _behind_s(self) -> float:
        return 0.0

    async def state(self) -> IndexState:
        return await asyncio.to_thread(lambda: IndexState(len(self._index), self._index.sequence, self._behind_s))


@serve.deployment(max_ongoing_requests=64, max_queued_requests=256, ray_actor_options={"num_cpus": 0.25})
class SearchDeployment(Searching):
    """A replica of the index: an immutable base, and what the writer has added and deleted since.

    Args:
        index: folder of the base, if any.
        live: folder of the writer's log; None for a read-only index.
    """

    def __init__(self, checkpoint: CheckpointRef, index: str | None, data: str, live: str | None) -> None:
        corpus, dimension = open_base(checkpoint, index, data)
        replica = LiveIndex.open(live, checkpoint.identity, dimension, base=corpus)
        super().__init__(checkpoint, replica, dimension)
        self._follower = Follower(replica) if live else None
        if self._follower:
            self._follower.start()

    @property
    def _behind_s(self) -> float:
        return self._follower.behind_s if self._follower else 0.0

    def check_health(self) -> None:
        """Serve calls this, and replaces the replica if it keeps failing. Raises: see `Follower.check_health`."""
        if self._follower:
            self._follower.check_health()


@serve.deployment(max_ongoing_requests=64, max_queued_requests=256, ray_actor_options={"num_cpus": 0.25})
class StoreDeployment(Searching):
    """Connections to a store, which takes the place of both the index's replicas and its writer."""

    def __init__(self, checkpoint: CheckpointRef, settings: Pgvector | Qdrant) -> None:
        self._store = open_store(settings, checkpoint)
        super().__init__(checkpoint, self._store, self._store.dimension)
        self._commits = SingleThread()

    async def commit(self, identity: str, records: list[Record]) -> Committed:
        """Commit records; every replica's searches find them when this returns.

        Raises:
            CheckpointMismatch: see `check_identity`.
            NoSpace, Unreachable, Unstorable: see `Store.commit`.
        """
        check_identity(self._checkpoint, identity)
        return await self._commits.run(self._store.commit, truncated(records, self._dimension))


def truncated(records: Sequence[Record], dimension: int) -> list[Record]:
    """The records with their vectors in as many dimensions as the index has."""
    return [
        replace(record, vector=truncate_array(record.vector[None], dimension)[0]) if isinstance(record, Add) else record
        for record in records
    ]


def commit_slots(requests: list[list[Record]]) -> int:
    """Slots of a batch of commits: one per request, plus one for every MiB of its pictures."""
    sizes = [sum(media_bytes(one.document) for one in records if isinstance(one, Add)) for records in requests]
    return slots_used([1 + size // 2**20 for size in sizes], COMMIT_SLOTS)


@serve.deployment(max_ongoing_requests=256, max_queued_requests=1024, ray_actor_options={"num_cpus": 0.25})
class WriterDeployment:
    """The index's only writer. Waiting requests are committed, and synced to disk, together.

    In an update Serve starts a new replica before the old one has exited, and may keep the old one until the new one is
    ready. A new one is therefore ready before it holds the index, and takes it when the old one exits.
    """

    def __init__(self, checkpoint: CheckpointRef, index: str | None, data: str, live: str) -> None:
        self._checkpoint = checkpoint
        corpus, self._dimension = open_base(checkpoint, index, data)
        ids: Iterable[str] = corpus.index.ids if corpus else ()
        self._open = partial(IndexWriter.open, live, checkpoint.identity, self._dimension, ids)
        self._runner, self._compacting = SingleThread(), threading.Lock()
        self._writer: IndexWriter | None = None
        self._failure: UserError | None = None
        try:
            self._writer = self._open()
        except Locked:
            threading.Thread(target=self._take_over, daemon=True).start()

    async def commit(self, identity: str, records: list[Record]) -> Committed:
        """Commit records; they are on disk when this returns.

        Raises:
            Busy: another writer still holds the index.
            CheckpointMismatch: see `check_identity`.
        """
        check_identity(self._checkpoint, identity)
        if self._writer is None:
            raise Busy
        await self._runner.idle()
        return await self._commit(records)

    def check_health(self) -> None:
        """Serve calls this, and replaces the replica if it keeps failing. Raises: UserError: see `IndexWriter.open`."""
        if self._failure:
            raise self._failure

    def _take_over(self) -> None:
        while True:
            try:
                self._writer = self._open(wait_s=LOCK_REPORT_S)
                return
            except Locked as error:
                logger.warning("commits wait: %s", error)
            except UserError as error:  # a new replica reports it when it starts
                self._failure = error
                return

    @serve.batch(max_batch_size=COMMIT_SLOTS, batch_wait_timeout_s=0, batch_size_fn=commit_slots)
    async def _commit(self, requests: list[list[Record]]) -> list[Committed]:
        writer = self._writer
        assert writer is not None
        all_records = truncated([record for records in requests for record in records], self._dimension)
        done = await self._runner.run(writer.commit, all_records)
        if writer.needs_compaction and not self._compacting.locked():
            threading.Thread(target=self._compact, args=(writer,), daemon=True).start()
        existed = iter(done.existed)
        return [Committed(done.sequence, [next(existed) for _ in records]) for records in requests]

    def _compact(self, writer: IndexWriter) -> None:
        with self._compacting:
            try:
                writer.compact()
            except UserError as error:  # the log stays as it is; the next commit tries again
                logger.error("the live index's log could not be compacted: %s", error)
