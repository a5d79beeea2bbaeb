"""A model deployment as the ingress sees it: requests are prepared for the checkpoint that its replicas hold.

Two things happen to replicas while requests are in flight. They die: the call is retried, within a budget. They are
replaced by replicas of another checkpoint: the request is prepared again for that one. Clients see neither as an error,
and no response mixes two checkpoints.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.serving.errors import Busy
from umarvel_ray.serving.replicas import CheckpointMismatch

Encoder = TypeVar("Encoder")
Result = TypeVar("Result")

TRIES = 4
UPDATE_TRIES, UPDATE_WAIT_S = 150, 0.2  # during an update


class RetryBudget:
    """Bounds retries to a fifth of all calls plus an initial burst, since a dying replica fails all its requests.

    A service that keeps failing is thus not hit with several times its load.
    """

    SHARE, BURST = 0.2, 128.0

    def __init__(self) -> None:
        self._left = self.BURST

    def earn(self) -> None:
        self._left = min(self._left + self.SHARE, self.BURST)

    def spend(self) -> bool:
        if self._left < 1:
            return False
        self._left -= 1
        return True


class ModelVersion(NamedTuple, Generic[Encoder]):
    """A checkpoint that requests are prepared for, and its encoder."""

    checkpoint: CheckpointRef
    encoder: Encoder

    @property
    def identity(self) -> str:
        return self.checkpoint.identity


class RemoteModel(Generic[Encoder]):
    """A deployment's handle with the encoder of its current checkpoint.

    Args:
        load: returns the encoder of a checkpoint.
    """

    def __init__(
        self, handle: DeploymentHandle, checkpoint: CheckpointRef, load: Callable[[CheckpointRef], Encoder]
    ) -> None:
        self._handle, self._load, self._budget = handle, load, RetryBudget()
        self.current: ModelVersion[Encoder] = ModelVersion(checkpoint, load(checkpoint))
        self._known = {self.current.identity: self.current}  # during an update, replicas of both versions respond

    @property
    def name(self) -> str:
        return Path(self.current.checkpoint.path).name

    async def call(self, send: Callable[[DeploymentHandle], Any]) -> Any:
        """Await one call of the deployment; if its replica dies, another one is called.

        Raises:
            Busy: the queue is full, there is no replica, or too many of them died.
            CheckpointMismatch: the replica holds another checkpoint.
        """
        return await call_deployment(lambda: send(self._handle), self._budget)

    async def through_updates(self, work: Callable[[ModelVersion[Encoder]], Awaitable[Result]]) -> Result:
        """Do work that prepares and calls, and do it again whenever a replica turns out to hold another checkpoint.

        Raises:
            Busy: the update took too long.
        """
        for _ in range(UPDATE_TRIES):
            version = self.current
            try:
                return await work(version)
            except CheckpointMismatch as error:
                other = error.checkpoint
                if version is self.current and other.identity != version.identity:
                    self.current = self._known.get(other.identity) or ModelVersion(
                        other, await asyncio.to_thread(self._load, other)
                    )
                    self._known = {one.identity: one for one in (version, self.current)}
            await asyncio.sleep(UPDATE_WAIT_S)
        raise Busy


async def call_deployment(send: Callable[[], Any], budget: RetryBudget) -> Any:
    """Await one call of a deployment. Raises: see `RemoteModel.call`."""
    budget.earn()
    for attempt in range(TRIES):
        try:
            return await send()
        except (BackPressureError, DeploymentUnavailableError):
            raise Busy from None
        except RayActorError:  # the replica or its node died
            if attempt == TRIES - 1 or not budget.spend():
                break
            await asyncio.sleep(0.05 * 2**attempt)
    raise Busy
