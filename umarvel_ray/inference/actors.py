"""Long-lived Ray actors: started once, used for every checkpoint, restarted when they die.

Each call carries everything an actor needs (which checkpoint, which rows), so a restarted actor needs no other state.
Actors on CPUs live as long as their group, because their caches are worth keeping. Actors on GPUs are stopped when
something else claims the GPUs (`inference/gpus.py`), and started again on next use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayTaskError

from umarvel_ray.errors import UserError
from umarvel_ray.inference.gpus import Gpus
from umarvel_ray.recipe import Cluster, Compute
from umarvel_ray.waiting import SAY_EVERY, require_room, resources, say_waiting

CALLS_IN_FLIGHT = 2  # per actor: the next call's input is transferred while the current call runs
SAY_FIRST = 15.0  # seconds; starting an actor takes a few even if there is room for it
GPU_DEVICE = "cuda"


class ActorGroup:
    """A fixed number of identical actors, started on first use and killed when the `with` block exits.

    Args:
        actor: a Ray actor class whose constructor takes the compute settings, a device and a number of threads.
        cluster: the number of actors, their resources, and how often an actor or a call is retried after a crash.
        what: the kind of work, for messages.
        gpus: shared with whatever else uses the GPUs while this group is open; not used by a group on CPUs.
    """

    def __init__(self, actor: Any, cluster: Cluster, compute: Compute, what: str, gpus: Gpus | None = None) -> None:
        options = {
            "num_cpus": cluster.cpus_per_embedder,
            "num_gpus": cluster.gpus_per_embedder,
            "max_restarts": cluster.max_failures,
            "max_task_retries": cluster.max_failures,
        }
        self.device = GPU_DEVICE if cluster.gpus_per_embedder > 0 else "cpu"
        threads = max(1, int(cluster.cpus_per_embedder))
        self._start = lambda: actor.options(**options).remote(compute, self.device, threads)
        self.count = cluster.embedders
        self._needs = resources(cluster.cpus_per_embedder, cluster.gpus_per_embedder)
        self._what = what
        self._gpus = (gpus or Gpus()) if cluster.gpus_per_embedder > 0 else None
        self._actors: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def actors(self) -> list[Any]:
        """All actors, alive; waits for them, and says so, while the cluster has no room. A claim ends their lives.

        Raises:
            UserError: a local Ray is too small for them.
        """
        if self._gpus:
            self._gpus.claim(self)
        if not self._actors:
            require_room(self._what, self.count, "actors", self._needs, "cluster.embedders")
            self._actors = [self._start() for _ in range(self.count)]
            self._wait()
        return self._actors

    def stop(self) -> None:
        """Kill the actors; the next use starts others."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _wait(self) -> None:
        pending = [actor.__ray_ready__.remote() for actor in self._actors]
        timeout = SAY_FIRST
        while pending:  # an actor that cannot start counts as ready: its first call fails
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=timeout)
            if pending:
                say_waiting(self._what, len(pending), "actors", self._needs, "cluster.embedders")
            timeout = SAY_EVERY

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
