"""Cohere's embed route, version 2; its rerank route is in rerank.py with Jina's."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from umarvel_ray.serving.items import Body, Item, Part, item_of_parts
from umarvel_ray.serving.routes.common import Name, Served, check_model, split_bad
from umarvel_ray.serving.routes.embeddings import shorten, wire_vector

router = APIRouter(tags=["embeddings"])

EmbeddingType = Literal["float", "base64", "binary", "ubinary"]


class Input(Body):
    content: Annotated[list[Part], Field(min_length=1)]


class EmbedRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"texts": ["a red car"], "input_type": "search_document", "embedding_types": ["float"]}]
        }
    )

    model: Name | None = None
    input_type: Literal["search_query", "search_document", "classification", "clustering", "image"]
    texts: Annotated[list[str], Field(min_length=1)] | None = None
    images: Annotated[list[str], Field(min_length=1)] | None = None
    inputs: Annotated[list[Input], Field(min_length=1)] | None = None
    embedding_types: Annotated[tuple[EmbeddingType, ...], Field(min_length=1)] = ("float",)
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
        embeddings={kind: [_typed(vector, kind) for vector in vectors] for kind in body.embedding_types},
        texts=body.texts,
        meta={"api_version": {"version": "2"}, "billed_units": {"input_tokens": sum(one.tokens for _, one in kept)}},
    )


def _typed(vector: np.ndarray, kind: EmbeddingType) -> Any:
    """One vector as JSON. `binary` and `ubinary` pack eight signs per byte, the first as the highest bit."""
    if kind in ("float", "base64"):
        return wire_vector(vector, kind)
    packed = np.packbits(vector > 0)
    return (packed if kind == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)).tolist()
