"""Cohere's second version of embed; its rerank stands beside Jina's in rerank.py."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from umarvel_ray.serving.items import Body, Item, Part, item_of_parts
from umarvel_ray.serving.routes.common import Name, Served, check_model, sorted_out
from umarvel_ray.serving.routes.embeddings import shorter, wire_vector

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
        default="END", description="accepted; texts over the model's length are cut at the end"
    )

    @model_validator(mode="after")
    def _one_of_three(self) -> EmbedRequest:
        if sum(given is not None for given in (self.texts, self.images, self.inputs)) != 1:
            raise PydanticCustomError("inputs", "give one of texts, images and inputs")
        return self

    @property
    def given(self) -> tuple[str, list[str | Item]]:
        """The items, and their key in the body."""
        if self.texts is not None:
            return "texts", list(self.texts)
        if self.images is not None:
            return "images", [Item(image=image) for image in self.images]
        return "inputs", [item_of_parts(one.content) for one in self.inputs]


class EmbedResponse(BaseModel):
    id: str
    embeddings: dict[str, list[Any]]
    texts: list[str] | None
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"
    meta: dict[str, Any]


@router.post("/v2/embed")
async def embed(body: EmbedRequest, backend: Served) -> EmbedResponse:
    """Unit vectors, one per input, in each of the forms asked for."""
    check_model(body.model, backend.embedder)
    name, items = body.given
    side = "query" if body.input_type == "search_query" else "document"
    kept, _ = sorted_out(await backend.embed(await backend.read(items, name), side), "fail")
    vectors = [shorter(one.vector, body.output_dimension) for _, one in kept]
    return EmbedResponse(
        id=str(uuid.uuid4()),
        embeddings={kind: [_typed(vector, kind) for vector in vectors] for kind in body.embedding_types},
        texts=body.texts,
        meta={"api_version": {"version": "2"}, "billed_units": {"input_tokens": sum(one.tokens for _, one in kept)}},
    )


def _typed(vector: np.ndarray, kind: EmbeddingType) -> Any:
    """`binary`: the coordinates' signs, eight to a byte, the first one highest, as Cohere and numpy pack them."""
    if kind in ("float", "base64"):
        return wire_vector(vector, kind)
    packed = np.packbits(vector > 0)
    return (packed if kind == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)).tolist()
