"""The deployments that hold models. They are told which checkpoint a request was prepared for, and run no other.

Embedding requests that wait share batches of up to `SLOTS` × `SLOT_TOKENS` tokens (pictures count by their tokens); a
vector does not depend on its companions (DESIGN rule 1), so every answer equals the library's.
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

REPLICAS = 2  # of the embedder: on a CPU one keeps the cores busy where the other is single-threaded
SLOT_TOKENS = 64
SLOTS = 64  # a batch is full at 4,096 tokens; each request takes a slot or more, so a batch is at most 64 requests

Answer = TypeVar("Answer")


class OtherModel(Exception):
    """The replica holds another checkpoint than the request was prepared for: an update is under way."""

    def __init__(self, checkpoint: CheckpointRef) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint


class OneThread:
    """Runs work beside the event loop, one call after another. Always the same thread: each that calls PyTorch keeps a
    pool of workers of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self, work: Callable[..., Answer], *given: Any) -> Answer:
        self._idle.clear()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)
        finally:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no work is done. Serve closes a batch some time after its first request has come, even if the
        batch before it still runs; requests that wait here first, for no time at all when nothing runs, are let into
        Serve's queue together and become one batch."""
        await self._idle.wait()


def filled(slots: list[int], most: int) -> int:
    """How much of a batch of `most` slots the requests fill that take so many each. One larger than a batch counts as a
    full one: it runs alone, where Serve would refuse it."""
    return min(slots[0], most) if len(slots) == 1 else sum(slots)


def batch_slots(requests: list[list[EncodedItem]]) -> int:
    return filled([-(-sum(item.length for item in items) // SLOT_TOKENS) for items in requests], SLOTS)


def check_identity(checkpoint: CheckpointRef, identity: str) -> None:
    """Raises: OtherModel."""
    if identity != checkpoint.identity:
        raise OtherModel(checkpoint)


@serve.deployment(
    num_replicas=REPLICAS,
    max_ongoing_requests=2 * SLOTS,
    max_queued_requests=4 * SLOTS,
    ray_actor_options={"num_cpus": 0.25},
)
class EmbedderDeployment:
    """The embedding model; concurrent requests are batched by tokens."""

    def __init__(self, checkpoint: CheckpointRef, runtime: Runtime) -> None:
        runtime.set_threads(REPLICAS)
        self._checkpoint = checkpoint
        self._embedder = Embedder.from_pretrained(checkpoint.path, runtime.device, runtime.dtype)
        self._embedder.encode_query(["warm-up"])
        self._runner = OneThread()
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
        everything = [item for items in requests for item in items]
        self._batches.inc()
        self._requests.inc(len(requests))
        self._tokens.inc(sum(item.length for item in everything))
        vectors = await self._runner.run(self._embedder.encode, everything)
        ends = np.cumsum([len(items) for items in requests])
        return np.split(vectors, ends[:-1])


@serve.deployment(max_ongoing_requests=8, max_queued_requests=64, ray_actor_options={"num_cpus": 0.5})
class RerankerDeployment:
    """The yes/no model. It batches the candidates of one query, whose prefix is computed once; queries take turns."""

    def __init__(self, checkpoint: CheckpointRef, runtime: Runtime) -> None:
        runtime.set_threads()
        self._checkpoint = checkpoint
        self._reranker = Reranker.from_pretrained(checkpoint.path, runtime.device, runtime.dtype)
        self._reranker.score("warm-up", ["warm-up"])
        self._runner = OneThread()

    async def score(self, identity: str, query: EncodedPair, documents: list[EncodedPair]) -> np.ndarray:
        """P(yes) per document, float32 (n,). Raises: see `check_identity`."""
        check_identity(self._checkpoint, identity)
        return await self._runner.run(self._reranker.score_encoded, query, documents)
