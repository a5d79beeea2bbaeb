"""The embed route of Hugging Face's Text Embeddings Inference, and its description of the service."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, Tag

from umarvel_ray.serving.backend import require_good
from umarvel_ray.serving.fields import Body
from umarvel_ray.serving.items import String, by_type
from umarvel_ray.serving.routes.common import Served
from umarvel_ray.serving.routes.embeddings import shorten
from umarvel_ray.version import __version__

router = APIRouter(tags=["embeddings"])

Texts = Annotated[
    String | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("a list")],
    by_type("give a string or a list of strings"),
]


class EmbedRequest(Body):
    inputs: Texts
    dimensions: Annotated[int, Field(ge=0)] | None = None


@router.post("/embed")
async def embed(body: EmbedRequest, backend: Served) -> list[list[float]]:
    """Unit vectors of texts, as queries."""
    given = [body.inputs] if isinstance(body.inputs, str) else list(body.inputs)
    embedded = require_good(await backend.embed(await backend.read(given, "inputs"), "query"))
    return [shorten(one.vector, body.dimensions).tolist() for one in embedded]


@router.get("/info")
async def info(backend: Served) -> dict[str, Any]:
    """What is served, with the limits that clients split their requests by."""
    settings = backend.embedder.current.checkpoint.settings
    return {
        "model_id": backend.embedder.name,
        "model_sha": backend.embedder.current.identity,
        "model_type": {"embedding": {"pooling": settings.pooling}},
        "max_input_length": settings.longest or settings.max_text_tokens,
        "max_client_batch_size": backend.limits.max_items,
        "version": __version__,
    }
