"""The service's store: opened as its settings say, and filled with the documents of an index."""

from __future__ import annotations

import os
from pathlib import Path

from umarvel_ray.errors import UserError
from umarvel_ray.index.copying import copy_embedded, copy_live, embedded_dimension
from umarvel_ray.index.corpus import made_with
from umarvel_ray.index.store import Store
from umarvel_ray.items.family import read_model_config
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.hub import model_ref
from umarvel_ray.recipe import Data
from umarvel_ray.serving.settings import Pgvector, Qdrant, read_config

API_KEY = "UMARVEL_STORE_API_KEY"


def dimension_of(checkpoint: CheckpointRef) -> int:
    """The dimension of an embedder's vectors."""
    return int(read_model_config(checkpoint.path).text_config.hidden_size)


def open_store(settings: Pgvector | Qdrant, checkpoint: CheckpointRef, dimension: int | None = None) -> Store:
    """Open a store; what does not exist yet is created.

    Args:
        checkpoint: that embeds the documents.
        dimension: of a new store; None for all dimensions of the model.

    Raises:
        Unreachable: the engine does not respond.
        UserError: its client is not installed, its documents are of another model, or it refuses.
    """
    size = dimension or dimension_of(checkpoint)
    url = settings.url.get_secret_value()
    try:
        if isinstance(settings, Pgvector):
            from umarvel_ray.index.pgvector import PgvectorStore

            return PgvectorStore(url, settings.table, checkpoint.identity, size, settings.exact)
        from umarvel_ray.index.qdrant import QdrantStore, connect

        client = connect(url, os.environ.get(API_KEY))
        return QdrantStore(client, settings.collection, checkpoint.identity, size, settings.exact)
    except ImportError as error:
        raise UserError(f'store: {error.name} is missing; pip install "umarvel-ray[{settings.kind}]"') from None


def fill_store(config: Path) -> None:
    """Copy the documents of a Serve config's `index` and `live` into its `store`, and print how many were missing.

    Raises:
        UserError: no store or nothing to copy in the config, or an index of another model; see also `open_store`,
            `copy_embedded` and `copy_live`.
    """
    service, _, _ = read_config(config)
    if not service.store:
        raise UserError(f"{config}: it has no `store` to copy documents into; see docs/serving.md")
    index, live = (Path(folder) if folder else None for folder in (service.index, service.live))
    if not index and not live:
        raise UserError(f"{config}: it has neither `index` nor `live`, so there is nothing to copy")
    checkpoint = model_ref(service.embedder, "embedder", service.preset)
    if index and made_with(index) not in (None, checkpoint.identity):
        raise UserError(f"{index} was embedded by a different model than {service.embedder}; embed the documents again")
    store = open_store(service.store, checkpoint, embedded_dimension(index) if index else None)
    try:
        changed = copy_embedded(store, index, Data(root=service.data)) if index else 0
        changed += copy_live(store, live, checkpoint.identity) if live and live.is_dir() else 0
        print(f"copied {changed:,} documents and changes; the {service.store.place} holds {len(store):,}")
    finally:
        store.close()
