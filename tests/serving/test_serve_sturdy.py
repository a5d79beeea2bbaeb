"""What clients see while replicas and the proxy are killed, the model changes, and replicas scale with the load."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from tests.support.served import call, service_of
from tests.support.tiny_run import TEXTS, make_run
from umarvel_ray.model.embedder import Embedder

pytestmark = pytest.mark.slow
NAME = "sturdy"
QUERIES = [f"{' '.join(TEXTS[: 1 + i % 5])} {i}" for i in range(40)]


@pytest.fixture(scope="module")
def other_run(tmp_path_factory) -> Path:
    """The same recipe with other weights."""
    from tests.support.tiny import make_tiny_base

    base = make_tiny_base(tmp_path_factory.mktemp("other_base"), seed=1)
    return make_run(base, tmp_path_factory.mktemp("runs") / "other")


@contextmanager
def load(send: Callable[[int], None], clients: int = 8) -> Iterator[list[BaseException]]:
    """Call `send(number)` repeatedly from several threads while the block runs; yields what the calls raised."""
    stop, raised = threading.Event(), []

    def client(number: int) -> None:
        while not stop.is_set():
            try:
                send(number)
            except Exception as error:
                raised.append(error)
            number += clients

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield raised
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def processes(title: str) -> list[int]:
    """Descendants of this process whose title matches, so never processes of another Ray."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _is_ours(folder, title)]


def _is_ours(folder: Path, title: str) -> bool:
    try:
        if not re.search(title, (folder / "cmdline").read_text()):
            return False
        while folder.name not in ("0", "1", str(os.getpid())):
            parent = re.search(r"PPid:\s+(\d+)", (folder / "status").read_text())[1]
            folder = folder.with_name(parent)
    except OSError:  # it exited meanwhile
        return False
    return folder.name == str(os.getpid())


def replicas(deployment: str) -> int:
    state = serve.status().applications[NAME].deployments[deployment]
    return state.replica_states.get("RUNNING", 0)


def wait_until(reached: Callable[[], bool], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.2)


def deploy(run: Path, **deployments: dict) -> None:
    """What `serve deploy` does with a config file; `deployments` are the options of each by name."""
    application = {
        "name": NAME,
        "route_prefix": "/",
        "import_path": "umarvel_ray.serving.app:build",
        "args": service_of(run, cache_mb=0).model_dump(),
        "deployments": [{"name": name} | options for name, options in deployments.items()],
    }
    _get_global_client().deploy_apps(ServeDeploySchema(applications=[application]))


def running() -> bool:
    application = serve.status().applications.get(NAME)
    return application is not None and application.status == "RUNNING"


def is_healthy(address: str) -> bool:
    try:
        return call(f"{address}/health")[0] == 200
    except OSError:  # no proxy, or one without routes yet
        return False


TWO = {name: {"num_replicas": 2} for name in ("Ingress", "EmbedderDeployment", "SearchDeployment")}


def test_killed_processes_and_a_new_model(address, run, other_run):
    """One service throughout: in every state, each response is correct for exactly one of the models."""
    deploy(run, **TWO)
    wait_until(running)
    old, new = (
        Embedder.from_pretrained(folder / "checkpoints" / "distillation").encode_query(QUERIES)
        for folder in (run, other_run)
    )
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=20)
    seen = []

    def send(number: int) -> None:
        number %= len(QUERIES)
        status, response, _ = call(f"{address}/v1/embeddings", {"input": QUERIES[number]})
        assert status == 200, response
        [row] = response["data"]
        matching = [np.abs(vectors[number] - row["embedding"]).max() < 1e-5 for vectors in (old, new)]
        assert any(matching), "the response matches neither model"
        seen.append(matching.index(True))

    def send_with_retries(number: int) -> None:
        number %= len(QUERIES)
        [row] = client.embeddings.create(model="distillation", input=QUERIES[number]).data
        assert np.abs(old[number] - row.embedding).max() < 1e-5

    with load(send) as raised:  # a model replica: clients notice nothing, without retries
        time.sleep(1)
        os.kill(processes("ServeReplica.*EmbedderDeployment")[0], signal.SIGKILL)
        time.sleep(1)
        wait_until(lambda: replicas("EmbedderDeployment") == 2)
    assert raised == []

    with load(send_with_retries) as raised:  # an ingress replica, then the proxy: client retries are enough
        time.sleep(1)
        os.kill(processes("ServeReplica.*Ingress")[0], signal.SIGKILL)
        wait_until(lambda: replicas("Ingress") == 2)
        os.kill(processes("ProxyActor")[0], signal.SIGKILL)
        time.sleep(1)
        wait_until(lambda: is_healthy(address))
        time.sleep(1)
    assert raised == []

    seen.clear()
    with load(send) as raised:
        deploy(other_run, **TWO)
        wait_until(lambda: sum(seen[-50:]) == 50)
        wait_until(running)
    assert raised == []
    assert set(seen) == {0, 1}
    status, _, _ = call(f"{address}/v1/search", {"query": QUERIES[0], "top_k": 3})
    assert status == 200


def test_replicas_scale_with_the_load(address, run):
    scaling = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 2}
    fast = {"upscale_delay_s": 1, "downscale_delay_s": 2, "metrics_interval_s": 0.5, "look_back_period_s": 2}
    deploy(run, EmbedderDeployment={"autoscaling_config": scaling | fast, "ray_actor_options": {"num_cpus": 0.2}})
    wait_until(lambda: running() and replicas("EmbedderDeployment") == 1)
    long = {"input": [f"{' '.join(TEXTS)} {number}" for number in range(48)]}
    with load(lambda _: call(f"{address}/v1/embeddings", long), clients=12) as raised:
        wait_until(lambda: replicas("EmbedderDeployment") >= 2)
        assert replicas("Ingress") == 1  # each deployment scales by its own load
    assert raised == []
    wait_until(lambda: replicas("EmbedderDeployment") == 1)
