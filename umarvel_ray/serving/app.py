"""The service on Ray Serve: an ingress before embedder, reranker, search and index writer, each a deployment.

`serve run serve/config.yaml` builds it from the paths there.
"""

# Not `from __future__ import annotations`: Serve makes a `Service` of the config's args by the annotation itself.
from ray import serve

from umarvel_ray.errors import UserError
from umarvel_ray.index.corpus import made_with
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.serving.auth import Keys
from umarvel_ray.serving.corpus import SearchDeployment, WriterDeployment
from umarvel_ray.serving.ingress import Ingress
from umarvel_ray.serving.remote import RemotePictures
from umarvel_ray.serving.replicas import EmbedderDeployment, RerankerDeployment
from umarvel_ray.serving.settings import Service, from_environment


def build(args: Service) -> serve.Application:
    """The application.

    Raises:
        UserError: a path does not exist; an index that another model made; bad API keys.
    """
    service = from_environment(args)
    RemotePictures(service.limits)  # a bad host is told here, before anything is replaced
    checkpoints = {
        name: CheckpointRef.of(path) for name in ("embedder", "reranker") if (path := getattr(service, name))
    }
    if service.index and made_with(service.index) not in (None, checkpoints["embedder"].identity):
        raise UserError(f"serve: {service.index} was made by another model than {service.embedder}; embed it again")
    embedder = EmbedderDeployment.bind(checkpoints["embedder"], service.runtime)
    reranker = RerankerDeployment.bind(checkpoints["reranker"], service.runtime) if service.reranker else None
    where = checkpoints["embedder"], service.index, service.data, service.live
    search = SearchDeployment.bind(*where) if service.index or service.live else None
    writer = WriterDeployment.bind(*where) if service.live else None
    parts = {"embedder": embedder, "reranker": reranker, "search": search, "writer": writer}
    return Ingress.bind(service, Keys.load(service.keys), checkpoints=checkpoints, **parts)
