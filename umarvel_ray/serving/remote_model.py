"""A model deployment as the ingress sees it: requests are prepared for the checkpoint that its replicas hold.

Two things happen to replicas while requests are under way. They die: the request is asked again, within a budget. They
are replaced by others with another checkpoint: the request is prepared anew for that one. Neither is an error to a
client, and no answer mixes two checkpoints.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.serving.errors import Busy
from umarvel_ray.serving.replicas import OtherModel

Encoder = TypeVar("Encoder")
Prepared = TypeVar("Prepared")
Answer = TypeVar("Answer")

TRIES = 4
UPDATE_TRIES, UPDATE_WAIT_S = 150, 0.2  # while an update goes on


class RetryBudget:
    """Retries may be a fifth of requests, and some at once, for a replica takes all its requests with it: a service
    that goes on failing is not asked several times as often."""

    SHARE, AT_ONCE = 0.2, 128.0

    def __init__(self) -> None:
        self._left = self.AT_ONCE

    def earn(self) -> None:
        self._left = min(self._left + self.SHARE, self.AT_ONCE)

    def spend(self) -> bool:
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Held(NamedTuple, Generic[Encoder]):
    """The checkpoint that requests are prepared for, and its encoder."""

    checkpoint: CheckpointRef
    encoder: Encoder

    @property
    def identity(self) -> str:
        return self.checkpoint.identity


class RemoteModel(Generic[Encoder]):
    """A deployment's handle with the encoder of its present checkpoint.

    Args:
        load: the encoder of a checkpoint.
    """

    def __init__(
        self, handle: DeploymentHandle, checkpoint: CheckpointRef, load: Callable[[CheckpointRef], Encoder]
    ) -> None:
        self._handle, self._load, self._budget = handle, load, RetryBudget()
        self.held = Held(checkpoint, load(checkpoint))
        self._known = {self.held.identity: self.held}  # while replicas are replaced, answers come from both kinds

    @property
    def name(self) -> str:
        return Path(self.held.checkpoint.path).name

    async def ask(self, send: Callable[[DeploymentHandle], DeploymentResponse]) -> Any:
        """Await one answer; another replica is asked when one dies.

        Raises:
            Busy: the queue is full, no replica, or too many of them died.
            OtherModel: the replica holds another checkpoint.
        """
        return await ask(lambda: send(self._handle), self._budget)

    async def through_updates(self, work: Callable[[Held[Encoder]], Awaitable[Answer]]) -> Answer:
        """Do work that prepares and asks, anew whenever a replica turns out to hold another checkpoint.

        Raises:
            Busy: the update did not end.
        """
        for _ in range(UPDATE_TRIES):
            held = self.held
            try:
                return await work(held)
            except OtherModel as error:
                other = error.checkpoint
                if held is self.held and other.identity != held.identity:
                    self.held = self._known.get(other.identity) or Held(
                        other, await asyncio.to_thread(self._load, other)
                    )
                    self._known = {one.identity: one for one in (held, self.held)}
            await asyncio.sleep(UPDATE_WAIT_S)
        raise Busy


async def ask(send: Callable[[], DeploymentResponse], budget: RetryBudget) -> Any:
    """Await one answer of a deployment. Raises: see `RemoteModel.ask`."""
    budget.earn()
    for tried in range(TRIES):
        try:
            return await send()
        except (BackPressureError, DeploymentUnavailableError):
            raise Busy from None
        except RayActorError:  # the replica died, or its node went away
            if tried == TRIES - 1 or not budget.spend():
                break
            await asyncio.sleep(0.05 * 2**tried)
    raise Busy
