"""Long-lived Ray actors: started once, used for every checkpoint, restarted when they die.

Each call carries everything an actor needs (which checkpoint, which rows), so a restarted actor needs no other state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayTaskError

from umarvel_ray.errors import UserError
from umarvel_ray.recipe import Cluster, Compute

CALLS_IN_FLIGHT = 2  # per actor: the next call's input is transferred while the current call runs


class ActorGroup:
    """A fixed number of identical actors, started on first use and killed when the `with` block exits.

    Args:
        actor: a Ray actor class whose constructor takes the compute settings, a device and a number of threads.
        cluster: the number of actors, their resources, and how often an actor or a call is retried after a crash.
        what: the kind of work, for error messages.
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
        """Run numbered calls and yield their results as they complete.

        Call n is assigned to actor n mod count, so that its items are already cached there when the same table is
        embedded with the next checkpoint. An idle actor steals the last call of the longest queue.

        Args:
            submit: starts one call on one actor, for example `lambda actor, call: actor.method.remote(call)`.

        Raises:
            UserError: raised by a call, or an actor died more often than allowed.
        """
        queues: list[deque[int]] = [deque() for _ in self.actors]
        for call in calls:
            queues[call % len(queues)].append(call)
        in_flight: dict[ray.ObjectRef, int] = {}

        def submit_next(index: int) -> None:
            queue = queues[index]
            longest = max(queues, key=len)
            if queue or longest:
                call = queue.popleft() if queue else longest.pop()
                in_flight[submit(self.actors[index], call)] = index

        for index in [*range(len(queues))] * CALLS_IN_FLIGHT:
            submit_next(index)
        while in_flight:
            (done, *_), _ = ray.wait(list(in_flight))
            index = in_flight.pop(done)
            submit_next(index)
            yield self.get(done)

    def get(self, refs: Any) -> Any:
        """`ray.get`, but a `UserError` raised in an actor is re-raised as such, without Ray's traceback."""
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
