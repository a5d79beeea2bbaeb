"""OpenAI's embeddings route, which also takes items and vLLM's chat messages."""

from __future__ import annotations

import base64
from typing import Annotated, Literal

import numpy as np
import torch
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from umarvel_ray.model.vectors import truncate
from umarvel_ray.serving.errors import BadItem
from umarvel_ray.serving.items import Body, Item, OneOrMore, Part, String, by_type, item_of_parts
from umarvel_ray.serving.routes.common import (
    InputType,
    ItemError,
    Name,
    OnError,
    Served,
    Usage,
    check_model,
    split_bad,
)

router = APIRouter(tags=["embeddings"])


class Message(Body):
    """Part of one item: the system message is its instruction, the user message its texts and pictures."""

    role: Literal["system", "user"]
    content: Annotated[String | Annotated[list[Part], Tag("a list")], by_type("give a string or a list of parts")]

    @property
    def item(self) -> Item:
        return Item(text=self.content) if isinstance(self.content, str) else item_of_parts(self.content)


class EmbeddingsRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": ["a red car", {"text": "a red car", "instruction": "Find an image that matches."}]},
                {"input": [{"image": "data:image/png;base64,…", "text": "my car"}], "input_type": "document"},
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "a red car"}]}]},
            ]
        }
    )

    input: OneOrMore | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=2)] | None = None
    model: Name | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="keep only this many dimensions and renormalize (for models trained for it)"
    )
    input_type: InputType = "query"
    on_error: OnError = "fail"
    user: Name | None = Field(default=None, description="accepted for OpenAI clients, ignored")

    @model_validator(mode="after")
    def _one_of_two(self) -> EmbeddingsRequest:
        if (self.input is None) == (self.messages is None):
            raise PydanticCustomError("input", "give either input or messages")
        if self.messages and [message.role for message in self.messages] not in (["user"], ["system", "user"]):
            raise PydanticCustomError("messages", "give one user message, optionally preceded by one system message")
        return self

    @property
    def items(self) -> str | Item | list[str | Item]:
        if self.messages is None:
            assert self.input is not None  # checked above
            return self.input
        item = self.messages[-1].item
        instruction = self.messages[0].item.text if len(self.messages) > 1 else None
        return item.model_copy(update={"instruction": instruction})


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="floats, or base64 of little-endian float32")


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    errors: list[ItemError] = Field(default=[], description="the items left out with `on_error: skip`")


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, backend: Served) -> EmbeddingsResponse:
    """Unit vectors, one per item, in order."""
    model = backend.embedder
    check_model(body.model, model)
    read = await backend.read(body.items, "messages" if body.messages else "input")
    kept, errors = split_bad(await backend.embed(read, body.input_type), body.on_error)
    tokens = sum(one.tokens for _, one in kept)
    return EmbeddingsResponse(
        data=[
            Embedding(index=number, embedding=wire_vector(shorten(one.vector, body.dimensions), body.encoding_format))
            for number, one in kept
        ],
        model=model.name,
        usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        errors=errors,
    )


def shorten(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The vector's first `dimensions` coordinates, scaled to unit norm.

    Raises:
        BadItem: the model has fewer dimensions.
    """
    if dimensions is None:
        return vector
    if dimensions > len(vector):
        raise BadItem(f"dimensions: {dimensions}; the model has only {len(vector)}", "dimensions")
    return truncate(torch.from_numpy(vector)[None], dimensions)[0].numpy()


def wire_vector(vector: np.ndarray, encoding: Literal["float", "base64"]) -> list[float] | str:
    """One embedding as JSON floats, or as OpenAI's base64 of little-endian float32."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
