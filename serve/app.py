"""The service on Ray Serve: an ingress in front of embedder, reranker and search, each a deployment of its own.

`serve run serve/config.yaml` builds it from the paths there.
"""

from __future__ import annotations

from ray import serve

from serve.corpus import SearchDeployment
from serve.ingress import Ingress
from serve.replicas import EmbedderDeployment, RerankerDeployment
from serve.settings import Service, from_environment
from umarvel_ray.mine.embed import describe


def build(args: Service) -> serve.Application:
    """The application.

    Raises:
        UserError: a path does not exist, or an index that another model made.
    """
    service = from_environment(args)
    checkpoints = {name: describe(path) for name in ("embedder", "reranker") if (path := getattr(service, name))}
    embedder = EmbedderDeployment.bind(checkpoints["embedder"], service.runtime)
    reranker = RerankerDeployment.bind(checkpoints["reranker"], service.runtime) if service.reranker else None
    search = SearchDeployment.bind(checkpoints["embedder"], service.index, service.data) if service.index else None
    return Ingress.bind(service, checkpoints, embedder, reranker, search)
