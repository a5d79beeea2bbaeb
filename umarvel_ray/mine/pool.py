"""Ray actors that live as long as the driver wants: loaded once, used for every checkpoint, restarted when they die.

Every call carries all an actor needs to know (which checkpoint, which rows), so a restarted actor simply goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from umarvel_ray.errors import UserError
from umarvel_ray.recipe import Cluster, Engine

AHEAD = 2  # calls in flight per actor: the next one's input travels while this one is worked on


class Pool:
    """A fixed number of equal actors, started at first use and stopped on leaving the `with` block.

    Args:
        actor: a Ray actor class; its constructor takes the engine, whether it has a GPU, and its number of threads.
        cluster: how many actors, how large, and how often each actor, and each call, is tried again after a crash.
        what: names the work in errors.
    """

    def __init__(self, actor: Any, cluster: Cluster, engine: Engine, what: str) -> None:
        options = {
            "num_cpus": cluster.cpus_per_embedder,
            "num_gpus": cluster.gpus_per_embedder,
            "max_restarts": cluster.max_failures,
            "max_task_retries": cluster.max_failures,
        }
        gpu, threads = cluster.gpus_per_embedder > 0, max(1, int(cluster.cpus_per_embedder))
        self._start = lambda: actor.options(**options).remote(engine, gpu, threads)
        self._count = cluster.embedders
        self._what = what
        self._actors: list[Any] = []

    def __enter__(self):
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

    def run(self, jobs: Sequence[int], submit: Callable[[Any, int], ray.ObjectRef]) -> Iterator[Any]:
        """Do numbered jobs, yielding results as they come.

        Job n belongs to actor n mod count, which then has its items cached when the same table is embedded with the
        next checkpoint; an idle actor takes the last job of the longest queue.

        Args:
            submit: starts one job on one actor, as `lambda actor, job: actor.method.remote(job)`.

        Raises:
            UserError: raised by a job, or an actor died more often than allowed.
        """
        queues: list[deque[int]] = [deque() for _ in self.actors]
        for job in jobs:
            queues[job % len(queues)].append(job)
        in_flight: dict[ray.ObjectRef, int] = {}

        def feed(place: int) -> None:
            queue = queues[place]
            longest = max(queues, key=len)
            if queue or longest:
                job = queue.popleft() if queue else longest.pop()
                in_flight[submit(self.actors[place], job)] = place

        for place in [*range(len(queues))] * AHEAD:
            feed(place)
        while in_flight:
            (done, *_), _ = ray.wait(list(in_flight))
            place = in_flight.pop(done)
            feed(place)
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
            hint = "if memory ran out, lower engine.token_budget"
            raise UserError(f"{self._what}: an actor died too often ({reason}); {hint}") from None
