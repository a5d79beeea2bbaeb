"""Cohere's embed routes, versions 1 and 2; its rerank route is in rerank.py with Jina's."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from umarvel_ray.serving.fields import Body
from umarvel_ray.serving.items import Item, Parts, item_of_parts
from umarvel_ray.serving.routes.common import Name, Served, check_model, split_bad
from umarvel_ray.serving.routes.embeddings import shorten, wire_vector

router = APIRouter(tags=["embeddings"])

EmbeddingType = Literal["float", "base64", "binary", "ubinary", "int8", "uint8"]


InputKind = Literal["search_query", "search_document", "classification", "clustering", "image"]


class Input(Body):
    content: Parts


class EmbedRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"texts": ["a red car"], "input_type": "search_document", "embedding_types": ["float"]}]
        }
    )

    model: Name | None = None
    input_type: InputKind
    texts: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    images: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    inputs: Annotated[list[Input], Field(min_length=1, fail_fast=True)] | None = None
    embedding_types: Annotated[tuple[EmbeddingType, ...], Field(min_length=1, max_length=6)] = ("float",)
    output_dimension: Annotated[int, Field(ge=1)] | None = None
    truncate: Literal["NONE", "START", "END"] = Field(
        default="END", description="accepted for Cohere clients, ignored: long texts are truncated at the end"
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> EmbedRequest:
        if sum(value is not None for value in (self.texts, self.images, self.inputs)) != 1:
            raise PydanticCustomError("inputs", "give exactly one of texts, images and inputs")
        return self

    @property
    def items(self) -> tuple[str, list[str | Item]]:
        """The items' key in the request body, and the items."""
        if self.texts is not None:
            return "texts", list(self.texts)
        if self.images is not None:
            return "images", [Item(image=image) for image in self.images]
        return "inputs", [item_of_parts(one.content) for one in self.inputs or ()]


class OldEmbedRequest(EmbedRequest):
    """Version 1: neither `input_type` nor `embedding_types` is needed."""

    input_type: InputKind = "search_document"
    embedding_types: Annotated[tuple[EmbeddingType, ...], Field(max_length=6)] = ()


class OldEmbedResponse(BaseModel):
    id: str
    embeddings: list[list[float]] | dict[str, list[Any]] = Field(description="floats, or by the types asked for")
    texts: list[str]
    response_type: Literal["embeddings_floats", "embeddings_by_type"]
    meta: dict[str, Any]


class EmbedResponse(BaseModel):
    id: str
    embeddings: dict[str, list[Any]]
    texts: list[str] | None
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"
    meta: dict[str, Any]


@router.post("/v2/embed")
async def embed(body: EmbedRequest, backend: Served) -> EmbedResponse:
    """Unit vectors, one per input, in each of the requested types."""
    check_model(body.model, backend.embedder)
    name, items = body.items
    side = "query" if body.input_type == "search_query" else "document"
    kept, _ = split_bad(await backend.embed(await backend.read(items, name), side), "fail")
    vectors = [shorten(one.vector, body.output_dimension) for _, one in kept]
    return EmbedResponse(
        id=str(uuid.uuid4()),
        embeddings={kind: [wire_vector(vector, kind) for vector in vectors] for kind in body.embedding_types},
        texts=body.texts,
        meta={"api_version": {"version": "2"}, "billed_units": {"input_tokens": sum(one.tokens for _, one in kept)}},
    )


@router.post("/v1/embed")
async def embed_as_version_1(body: OldEmbedRequest, backend: Served) -> OldEmbedResponse:
    """The same vectors in the response of Cohere's version 1."""
    found = await embed(body.model_copy(update={"embedding_types": body.embedding_types or ("float",)}), backend)
    return OldEmbedResponse(
        id=found.id,
        embeddings=found.embeddings if body.embedding_types else found.embeddings["float"],
        texts=found.texts or [],
        response_type="embeddings_by_type" if body.embedding_types else "embeddings_floats",
        meta=found.meta | {"api_version": {"version": "1"}},
    )
