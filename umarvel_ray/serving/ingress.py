"""The HTTP side: JSON, limits, picture decoding and tokenization on CPUs, in processes separate from the models."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import BackpressureConfig

from umarvel_ray.serving.auth import Keys
from umarvel_ray.serving.backend import Backend
from umarvel_ray.serving.errors import ERROR_RESPONSES, RETRY_AFTER_S, add_handlers
from umarvel_ray.serving.middleware import guard
from umarvel_ray.serving.routes import cohere, embeddings, index, page, rerank, search, system, tei
from umarvel_ray.serving.settings import Limits, Service
from umarvel_ray.version import __version__

CONNECTIONS = 4096  # of slow clients whose bodies are not complete, too; see `Limits.max_requests`


def make_app(backend: Backend | None, limits: Limits, keys: Keys) -> FastAPI:
    """The routes on top of `backend`, guarded by limits and keys. Without a backend, only the OpenAPI schema works."""
    app = FastAPI(
        title="umarvel-ray", version=__version__, description="Universal multimodal embeddings, reranking and search."
    )
    app.state.backend = backend
    add_handlers(app)
    for module in (embeddings, cohere, tei, rerank, search, index, system, page):
        app.include_router(module.router, responses=ERROR_RESPONSES)
    guard(app, limits, keys)
    return app


@serve.deployment(
    max_ongoing_requests=CONNECTIONS,
    max_queued_requests=CONNECTIONS,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
    ray_actor_options={"num_cpus": 0.25},
)
@serve.ingress()  # public API: without an app, Serve calls `__serve_build_asgi_app__` after the constructor
class Ingress:
    """One process that handles requests; `parts` are the other arguments of `Backend`."""

    def __init__(self, service: Service, keys: Keys, **parts: Any) -> None:
        self._limits, self._keys = service.limits, keys
        self._backend = Backend(service, **parts)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._backend, self._limits, self._keys)
