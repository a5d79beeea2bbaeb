"""The service on Ray Serve: an ingress in front of the embedder, reranker, search and index writer deployments.

`serve run serve/config.yaml` builds it from the paths in that file.
"""

# No `from __future__ import annotations`: Serve converts the config's args to `Service` by reading the annotation.
from typing import Any

from ray import serve

from umarvel_ray.errors import UserError
from umarvel_ray.index.corpus import made_with
from umarvel_ray.model.hub import model_ref
from umarvel_ray.serving.auth import Keys
from umarvel_ray.serving.corpus import SearchDeployment, StoreDeployment, WriterDeployment
from umarvel_ray.serving.ingress import Ingress
from umarvel_ray.serving.remote import RemotePictures
from umarvel_ray.serving.replicas import EmbedderDeployment, RerankerDeployment
from umarvel_ray.serving.settings import Service, from_environment
from umarvel_ray.serving.store import open_store


def build(args: Service) -> serve.Application:
    """Build the application.

    Raises:
        UserError: a path does not exist, the index or the store's documents were embedded by a different model, the
            store cannot be used, or the API keys or the allowed hosts are invalid.
    """
    service = from_environment(args)
    RemotePictures(service.limits)  # reports an invalid host here, before any running replica is replaced
    checkpoints = {"embedder": model_ref(service.embedder, "embedder", service.preset)}
    if service.reranker:
        checkpoints["reranker"] = model_ref(service.reranker, "reranker", service.reranker_preset)
    if service.store:
        open_store(service.store, checkpoints["embedder"]).close()  # its errors, too
    elif service.index and made_with(service.index) not in (None, checkpoints["embedder"].identity):
        raise UserError(
            f"serve: {service.index} was embedded by a different model than {service.embedder}; "
            "embed the documents again"
        )
    embedder = _bind(EmbedderDeployment, checkpoints["embedder"], service.runtime)
    reranker = _bind(RerankerDeployment, checkpoints["reranker"], service.runtime) if service.reranker else None
    index_args = checkpoints["embedder"], service.index, service.data, service.live
    if service.store:
        search = writer = _bind(StoreDeployment, checkpoints["embedder"], service.store)
    else:
        search = _bind(SearchDeployment, *index_args) if service.index or service.live else None
        writer = _bind(WriterDeployment, *index_args) if service.live else None
    parts = {"embedder": embedder, "reranker": reranker, "search": search, "writer": writer}
    return _bind(Ingress, service, Keys.load(service.keys), checkpoints=checkpoints, **parts)


def _bind(deployment: Any, *args: Any, **kwargs: Any) -> serve.Application:
    """`deployment.bind(...)`; Serve's type annotations say that a decorated class is still the plain class."""
    return deployment.bind(*args, **kwargs)
