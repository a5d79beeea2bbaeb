"""The deployment that searches: the index and the documents behind it."""

from __future__ import annotations

import asyncio

import numpy as np
from ray import serve

from serve.replicas import Checkpoint, check_identity
from umarvel_ray.recipe import Data
from umarvel_ray.search import Corpus, Hit


@serve.deployment(max_ongoing_requests=64, max_queued_requests=256, ray_actor_options={"num_cpus": 0.25})
class SearchDeployment:
    """The index of one embedder's vectors."""

    def __init__(self, checkpoint: Checkpoint, index: str, data: str) -> None:
        self._checkpoint = checkpoint
        self._corpus = Corpus.open(index, Data(root=data))

    async def search(self, identity: str, vector: np.ndarray, top_k: int, filters: dict[str, list[str]]) -> list[Hit]:
        """The best documents that pass the filters, best first. Raises: see `check_identity`."""
        check_identity(self._checkpoint, identity)
        return await asyncio.to_thread(self._corpus.search, vector, top_k)
