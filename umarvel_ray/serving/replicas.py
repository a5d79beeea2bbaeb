"""The deployments that hold models. Each request names the checkpoint it was prepared for; replicas run no other.

Waiting embedding requests share batches of up to `SLOTS` × `SLOT_TOKENS` tokens (pictures count by their tokens). A
vector does not depend on the other items in its batch, so every response equals the library's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from ray import serve
from ray.serve.metrics import Counter

from umarvel_ray.items.encoder import EncodedItem
from umarvel_ray.items.pair_encoder import EncodedPair
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.serving.settings import Runtime

REPLICAS = 2  # of the embedder: on a CPU, one uses the cores while the other is in single-threaded code
SLOT_TOKENS = 64
SLOTS = 64  # a full batch is 4,096 tokens; a request takes at least one slot, so a batch has at most 64 requests

Result = TypeVar("Result")


class CheckpointMismatch(Exception):
    """The replica holds a different checkpoint than the request was prepared for: an update is in progress."""

    def __init__(self, checkpoint: CheckpointRef) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint


class SingleThread:
    """Runs calls one after another in a thread of their own, off the event loop.

    It is always the same thread, because PyTorch keeps a set of worker threads for every thread that calls it.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self, work: Callable[..., Result], *args: Any) -> Result:
        self._idle.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        finally:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until nothing is running.

        Serve closes a batch soon after its first request arrives, even while the previous batch is still running.
        Requests that wait here first (no time at all when nothing is running) enter Serve's queue together and form
        one batch.
        """
        await self._idle.wait()


def slots_used(slots: list[int], capacity: int) -> int:
    """Slots that a batch of requests takes, given the slots of each.

    A single request larger than `capacity` counts as a full batch, so that it runs alone; Serve would reject it.
    """
    return min(slots[0], capacity) if len(slots) == 1 else sum(slots)


def batch_slots(requests: list[list[EncodedItem]]) -> int:
    """Slots of a batch of embedding requests, each rounded up to whole slots."""
    return slots_used([-(-sum(item.length for item in items) // SLOT_TOKENS) for items in requests], SLOTS)


def check_identity(checkpoint: CheckpointRef, identity: str) -> None:
    """Raises: CheckpointMismatch."""
    if identity != checkpoint.identity:
        raise CheckpointMismatch(checkpoint)


@serve.deployment(
    num_replicas=REPLICAS,
    max_ongoing_requests=2 * SLOTS,
    max_queued_requests=4 * SLOTS,
    ray_actor_options={"num_cpus": 0.25},
)
class EmbedderDeployment:
    """The embedding model; concurrent requests are batched by tokens."""

    def __init__(self, checkpoint: CheckpointRef, runtime: Runtime) -> None:
        runtime.prepare(REPLICAS)
        self._checkpoint = checkpoint
        self._embedder = Embedder.from_pretrained(checkpoint.path, runtime.device, runtime.dtype, checkpoint.settings)
        self._embedder.encode_query(["warm-up"])
        self._runner = SingleThread()
        self._batches = Counter("umarvel_batches", "batches that the embedder has run")
        self._requests = Counter("umarvel_batch_requests", "requests in them")
        self._tokens = Counter("umarvel_batch_tokens", "tokens in them")

    async def encode(self, identity: str, items: list[EncodedItem]) -> np.ndarray:
        """Unit vectors, float32 (n, d). Raises: see `check_identity`."""
        check_identity(self._checkpoint, identity)
        await self._runner.idle()
        return await self._encode_batch(items)

    @serve.batch(max_batch_size=SLOTS, batch_wait_timeout_s=0, batch_size_fn=batch_slots)
    async def _encode_batch(self, requests: list[list[EncodedItem]]) -> list[np.ndarray]:
        all_items = [item for items in requests for item in items]
        self._batches.inc()
        self._requests.inc(len(requests))
        self._tokens.inc(sum(item.length for item in all_items))
        vectors = await self._runner.run(self._embedder.embed_encoded, all_items)
        ends = np.cumsum([len(items) for items in requests])
        return np.split(vectors, ends[:-1])


@serve.deployment(max_ongoing_requests=8, max_queued_requests=64, ray_actor_options={"num_cpus": 0.5})
class RerankerDeployment:
    """The pointwise reranker. It batches the candidates of one query, whose prefix is computed once.

    Calls are processed one at a time.
    """

    def __init__(self, checkpoint: CheckpointRef, runtime: Runtime) -> None:
        runtime.prepare()
        self._checkpoint = checkpoint
        self._reranker = Reranker.from_pretrained(
            checkpoint.path, runtime.device, runtime.dtype, settings=checkpoint.settings
        )
        self._reranker.score("warm-up", ["warm-up"])
        self._runner = SingleThread()

    async def score(self, identity: str, groups: list[tuple[EncodedPair, list[EncodedPair]]]) -> list[float]:
        """P(yes) of each query's documents, one list for all queries. Raises: see `check_identity`."""
        check_identity(self._checkpoint, identity)

        def work() -> list[float]:
            return [float(p) for query, documents in groups for p in self._reranker.score_encoded(query, documents)]

        return await self._runner.run(work)
