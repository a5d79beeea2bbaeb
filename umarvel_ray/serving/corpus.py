"""The search and writer deployments: replicas of one live index, and its only writer."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import replace

import numpy as np
from ray import serve

from umarvel_ray.errors import UserError
from umarvel_ray.index.corpus import Corpus
from umarvel_ray.index.hits import Hit
from umarvel_ray.index.live import LiveIndex
from umarvel_ray.index.records import Add, Record
from umarvel_ray.index.writer import Committed, IndexWriter
from umarvel_ray.items.family import read_model_config
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.vectors import truncate_array
from umarvel_ray.recipe import Data
from umarvel_ray.serving.errors import NotSeen
from umarvel_ray.serving.replicas import SingleThread, check_identity, slots_used

FOLLOW_S = 0.2  # how often a replica reads the writer's log
AFTER_S = 10  # how long a search waits for the commit in `after`
COMMIT_SLOTS = 64
LOCK_WAIT_S = 120  # how long a new writer waits for the previous one to exit, in an update

logger = logging.getLogger("ray.serve")


def open_base(checkpoint: CheckpointRef, index: str | None, data: str) -> tuple[Corpus | None, int]:
    """The base, if any, and the dimension of the index.

    Raises:
        UserError: see `Corpus.open`.
    """
    if index is None:
        return None, read_model_config(checkpoint.path).text_config.hidden_size
    corpus = Corpus.open(index, Data(root=data))
    return corpus, corpus.index.dimension


@serve.deployment(max_ongoing_requests=64, max_queued_requests=256, ray_actor_options={"num_cpus": 0.25})
class SearchDeployment:
    """A replica of the index: an immutable base, and what the writer has added and deleted since.

    Args:
        index: folder of the base, if any.
        live: folder of the writer's log; None for a read-only index.
    """

    def __init__(self, checkpoint: CheckpointRef, index: str | None, data: str, live: str | None) -> None:
        self._checkpoint = checkpoint
        corpus, self._dimension = open_base(checkpoint, index, data)
        self._index = LiveIndex.open(live, checkpoint.identity, self._dimension, base=corpus)
        if live:
            threading.Thread(target=self._follow, daemon=True).start()

    async def search(
        self, identity: str, vector: np.ndarray, top_k: int, filters: dict[str, list[str] | None], after: int
    ) -> list[Hit]:
        """The nearest documents that pass the filters, best first.

        Args:
            vector: float32 (d,), unit norm.
            filters: see `LiveIndex.search`.
            after: number of a commit that the results must reflect.

        Raises:
            NotSeen: this replica has not reached that commit within `AFTER_S`.
            CheckpointMismatch: see `check_identity`.
        """
        check_identity(self._checkpoint, identity)
        deadline = time.monotonic() + AFTER_S
        while self._index.sequence < after:
            if time.monotonic() > deadline:
                raise NotSeen(after, self._index.sequence)
            await asyncio.sleep(FOLLOW_S / 4)
        return await asyncio.to_thread(
            self._index.search, truncate_array(vector[None], self._dimension)[0], top_k, **filters
        )

    async def size(self) -> tuple[int, int]:
        """The number of documents, and the number of the last commit this replica has read."""
        return len(self._index), self._index.sequence

    def _follow(self) -> None:
        while True:
            try:
                self._index.follow()
            except UserError as error:  # everything read before remains searchable
                logger.error("the live index cannot be followed: %s", error)
            time.sleep(FOLLOW_S)


def commit_slots(requests: list[list[Record]]) -> int:
    """Slots of a batch of commits: one per request, plus one for every MiB of its pictures."""
    sizes = [sum(len(one.image or b"") for one in records if isinstance(one, Add)) for records in requests]
    return slots_used([1 + size // 2**20 for size in sizes], COMMIT_SLOTS)


@serve.deployment(max_ongoing_requests=256, max_queued_requests=1024, ray_actor_options={"num_cpus": 0.25})
class WriterDeployment:
    """The index's only writer. Waiting requests are committed, and synced to disk, together."""

    def __init__(self, checkpoint: CheckpointRef, index: str | None, data: str, live: str) -> None:
        self._checkpoint = checkpoint
        corpus, self._dimension = open_base(checkpoint, index, data)
        ids = corpus.index.ids if corpus else ()
        self._writer = IndexWriter.open(live, checkpoint.identity, self._dimension, ids, wait_s=LOCK_WAIT_S)
        self._runner, self._compacting = SingleThread(), threading.Lock()

    async def commit(self, identity: str, records: list[Record]) -> Committed:
        """Commit records; they are on disk when this returns. Raises: see `check_identity`."""
        check_identity(self._checkpoint, identity)
        await self._runner.idle()
        return await self._commit(records)

    @serve.batch(max_batch_size=COMMIT_SLOTS, batch_wait_timeout_s=0, batch_size_fn=commit_slots)
    async def _commit(self, requests: list[list[Record]]) -> list[Committed]:
        all_records = [self._truncate(record) for records in requests for record in records]
        done = await self._runner.run(self._writer.commit, all_records)
        if self._writer.needs_compaction and not self._compacting.locked():
            threading.Thread(target=self._compact, daemon=True).start()
        existed = iter(done.existed)
        return [Committed(done.sequence, [next(existed) for _ in records]) for records in requests]

    def _truncate(self, record: Record) -> Record:
        if not isinstance(record, Add):
            return record
        return replace(record, vector=truncate_array(record.vector[None], self._dimension)[0])

    def _compact(self) -> None:
        with self._compacting:
            try:
                self._writer.compact()
            except UserError as error:  # the log stays as it is; the next commit tries again
                logger.error("the live index's log could not be compacted: %s", error)
