"""Ray actors that live as long as the driver wants: loaded once, used for every checkpoint, restarted when they die.

Every call carries all an actor needs to know (which checkpoint, which rows), so a restarted actor simply carries on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayTaskError

from umarvel_ray.errors import UserError
from umarvel_ray.recipe import Cluster, Compute

CALLS_IN_FLIGHT = 2  # per actor: the input of the next call travels while this one runs


class ActorGroup:
    """A fixed number of equal actors, started at first use and stopped on leaving the `with` block.

    Args:
        actor: a Ray actor class; its constructor takes the compute settings, its device and its number of threads.
        cluster: how many actors, how large, and how often each actor, and each call, is retried after a crash.
        what: names the work in errors.
    """

    def __init__(self, actor: Any, cluster: Cluster, compute: Compute, what: str) -> None:
        options = {
            "num_cpus": cluster.cpus_per_embedder,
            "num_gpus": cluster.gpus_per_embedder,
            "max_restarts": cluster.max_failures,
            "max_task_retries": cluster.max_failures,
        }
        self.device = "cuda" if cluster.gpus_per_embedder > 0 else "cpu"
        threads = max(1, int(cluster.cpus_per_embedder))
        self._start = lambda: actor.options(**options).remote(compute, self.device, threads)
        self._count = cluster.embedders
        self._what = what
        self._actors: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    @property
    def actors(self) -> list[Any]:
        if not self._actors:
            self._actors = [self._start() for _ in range(self._count)]
        return self._actors

    def run(self, calls: Sequence[int], submit: Callable[[Any, int], ray.ObjectRef]) -> Iterator[Any]:
        """Make numbered calls, yielding results as they come.

        Call n belongs to actor n mod count, which then has its items cached when the same table is embedded with the
        next checkpoint; an idle actor takes the last call of the longest queue.

        Args:
            submit: makes one call on one actor, as `lambda actor, number: actor.method.remote(number)`.

        Raises:
            UserError: raised by a call, or an actor died more often than allowed.
        """
        queues: list[deque[int]] = [deque() for _ in self.actors]
        for call in calls:
            queues[call % len(queues)].append(call)
        in_flight: dict[ray.ObjectRef, int] = {}

        def feed(number: int) -> None:
            queue = queues[number]
            longest = max(queues, key=len)
            if queue or longest:
                call = queue.popleft() if queue else longest.pop()
                in_flight[submit(self.actors[number], call)] = number

        for number in [*range(len(queues))] * CALLS_IN_FLIGHT:
            feed(number)
        while in_flight:
            (done, *_), _ = ray.wait(list(in_flight))
            number = in_flight.pop(done)
            feed(number)
            yield self.get(done)

    def get(self, refs: Any) -> Any:
        """`ray.get`, with an actor's own error line instead of Ray's traceback."""
        try:
            return ray.get(refs)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        except RayActorError as error:
            reason = str(error).splitlines()[0]
            hint = "if memory ran out, lower compute.token_budget"
            raise UserError(f"{self._what}: an actor died too often ({reason}); {hint}") from None
