"""A running service for tests, and a client for it."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from ray import serve

from umarvel_ray.serving.settings import Service


def service_of(run: Path, **changes) -> Service:
    """The service for a run folder of `make_run`; `changes` override its settings."""
    settings = {
        "embedder": str(run / "checkpoints" / "distillation"),
        "reranker": str(run / "checkpoints" / "reranker"),
        "index": str(run / "evaluation" / "distillation" / "test-documents"),
        "data": str(run / "data"),
        "live": str(run / "live"),
        "threads": 1,
    }
    return Service(**(settings | changes))


def config_file(service: Service, folder: Path, port: int = 8000, **changes) -> Path:
    """A Serve config file of a service; `changes` override its arguments."""
    args = service.model_dump(exclude={"limits", *changes}) | changes
    application = {"name": "a", "route_prefix": "/", "import_path": "umarvel_ray.serving.app:build", "args": args}
    made = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    path = folder / f"{uuid.uuid4().hex}.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serve_address() -> Iterator[str]:
    """Ray Serve on a free loopback port, while the block runs; yields its URL."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def call(url: str, body: dict | bytes | None = None, **headers: str) -> tuple[int, dict, dict]:
    """Status, JSON and headers of the response to a GET, or to a POST if there is a body."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers
