"""What the pipeline keeps alive together, placed on logical GPUs: `python -m tests.support.placement` prints JSON.

Actors and training loops are empty: only what they ask of Ray matters, and that is asked by the package's own code. The
numbers of actors and workers are divided by their greatest common divisor, because each is a process.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from umarvel_ray.ray_session import LOCAL_CPUS, prepare_environment

prepare_environment()

import ray  # noqa: E402
from ray.train.torch import TorchConfig  # noqa: E402

from umarvel_ray import waiting  # noqa: E402
from umarvel_ray.errors import UserError  # noqa: E402
from umarvel_ray.inference import actors as actors_module  # noqa: E402
from umarvel_ray.inference.actors import ActorGroup  # noqa: E402
from umarvel_ray.inference.gpus import Gpus  # noqa: E402
from umarvel_ray.recipe import SHIPPED, Cluster, Compute, load_recipe  # noqa: E402
from umarvel_ray.train import launch  # noqa: E402


def clusters() -> dict[str, list[str]]:
    """The shipped recipes' `cluster` sections as YAML, scaled down, with the names of the recipes that have them."""
    found: dict[str, list[str]] = {}
    for path in sorted(SHIPPED.glob("*.yaml")):
        cluster = load_recipe(path.stem).cluster
        shared = math.gcd(cluster.workers, cluster.embedders) if cluster.gpus_per_worker else 1
        scaled = {"workers": cluster.workers // shared, "embedders": cluster.embedders // shared, "preprocess_tasks": 1}
        key = yaml.safe_dump(cluster.model_copy(update=scaled).model_dump())
        found.setdefault(key, []).append(path.stem)
    return found


@ray.remote
class Idle:
    """Does nothing with the resources that it was given."""

    def __init__(self, compute: Compute, device: str, threads: int) -> None:
        pass

    def work(self, call: int) -> int:
        return call


def place(cluster: Cluster, folder: Path) -> bool:
    """Embed, rerank, train, embed again; returns whether the embedding actors stayed the same."""
    gpus = Gpus()
    with (
        ActorGroup(Idle, cluster, Compute(), "embedding", gpus) as embedders,
        ActorGroup(Idle, cluster, Compute(), "reranking", gpus) as rerankers,
    ):
        first = embedders.actors
        for group in (embedders, rerankers):
            run(group)
        if cluster.gpus_per_worker:
            gpus.free()
        launch._trainer("stage1", [], {}, cluster, folder, None).fit()
        run(embedders)
        return embedders.actors == first


def run(group: ActorGroup) -> None:
    calls = range(2 * group.count)
    assert sorted(group.run(calls, lambda actor, call: actor.work.remote(call))) == list(calls)


@contextmanager
def logical_ray(cpus: float, gpus: float, object_store_bytes: int = 80 * 2**20) -> Iterator[Path]:
    """A Ray of its own with that many logical GPUs; yields a folder."""
    folder = Path(tempfile.mkdtemp(prefix="um-", dir="/tmp"))
    ray.init(
        address="local",
        num_cpus=math.ceil(cpus),
        num_gpus=math.ceil(gpus),
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=str(folder / "ray"),
    )
    try:
        yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def say_what_is_waited_for() -> bool:
    """Ask for GPUs where there are none, and let the group and training's watcher notice."""
    cluster = Cluster(embedders=1, cpus_per_embedder=1, gpus_per_embedder=1)
    said = threading.Event()

    def say(*args: Any) -> None:
        waiting.say_waiting(*args)
        said.set()

    actors_module.SAY_FIRST, actors_module.say_waiting = 1.0, say
    group = ActorGroup(Idle, cluster, Compute(), "embedding")
    with suppress(UserError):  # a local Ray does not grow
        raise AssertionError(group.actors)
    os.environ["RAY_ADDRESS"] = "of a cluster that may grow"
    threading.Thread(target=lambda: group.actors, daemon=True).start()
    assert said.wait(60)
    del os.environ["RAY_ADDRESS"]
    ray.util.placement_group([{"CPU": 1.0, "GPU": 1.0}])
    return launch._is_pending([{"CPU": 1.0, "GPU": 1.0}])


def main() -> None:
    launch.TorchConfig = lambda backend: TorchConfig("gloo")  # there is no NCCL without GPUs
    launch._train_worker = lambda config: None
    placed: list[str] = []
    kept = {}
    for text, names in clusters().items():
        cluster = Cluster.model_validate(yaml.safe_load(text))
        on_gpus = bool(cluster.gpus_per_worker)
        workers = (cluster.workers * cluster.cpus_per_worker, cluster.workers * cluster.gpus_per_worker)
        embedders = (cluster.embedders * cluster.cpus_per_embedder, cluster.embedders * cluster.gpus_per_embedder)
        cpus, gpus = map(max, zip(workers, embedders, strict=True))
        with logical_ray(cpus if on_gpus else LOCAL_CPUS, gpus) as folder:
            kept[on_gpus] = place(cluster, folder)
            if not on_gpus:
                pending = say_what_is_waited_for()
        placed += names
    assert kept[True] is False
    print(json.dumps({"placed": sorted(placed), "kept on cpus": kept[False], "training waits": pending}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
