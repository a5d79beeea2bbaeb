"""OpenAI's embeddings route, which also takes items, vLLM's chat messages and Jina's fields; vLLM's pooling route."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Annotated, Any, Literal

import numpy as np
import torch
from fastapi import APIRouter
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from umarvel_ray.model.vectors import truncate
from umarvel_ray.serving.errors import BadItem
from umarvel_ray.serving.fields import Body
from umarvel_ray.serving.items import Content, Item, OneOrMore
from umarvel_ray.serving.routes.common import (
    InputType,
    ItemError,
    Name,
    OnError,
    Served,
    Usage,
    check_model,
    split_bad,
    usage_of,
)

router = APIRouter(tags=["embeddings"])


Encoding = Literal["float", "base64", "binary", "ubinary"]


class Message(Content):
    """Part of one item: the system message is its instruction, the user message its texts and pictures.

    An assistant message must be empty: vLLM's clients end with one where the model's template does.
    """

    role: Literal["system", "user", "assistant"]


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
    messages: Annotated[list[Message], Field(min_length=1, max_length=3)] | None = None
    model: Name | None = None
    encoding_format: Encoding = Field(
        default="float", validation_alias=AliasChoices("encoding_format", "embedding_type", "encoding_type")
    )
    dimensions: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="keep only this many dimensions and renormalize (for models trained for it); 0: all"
    )
    input_type: InputType | None = Field(default=None, description="by default as `task` says, or a query")
    task: Name | None = Field(default=None, description="Jina's: retrieval.query is a query, anything else a document")
    modality: Literal["text", "image", "video"] = Field(default="text", description="infinity's: what a string is")
    late_chunking: Literal[False] = Field(default=False, description="Jina's; not supported")
    on_error: OnError = "fail"
    user: Name | None = Field(default=None, description="accepted for OpenAI clients, ignored")

    @field_validator("input", mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        first = given[0] if isinstance(given, list) and given else None
        if isinstance(first, int) or (isinstance(first, list) and first and isinstance(first[0], int)):
            raise PydanticCustomError(
                "tokens",
                "token ids are another model's; send text (in LangChain: check_embedding_ctx_length=False)",
            )
        return given

    @model_validator(mode="after")
    def _one_of_two(self) -> EmbeddingsRequest:
        if (self.input is None) == (self.messages is None):
            raise PydanticCustomError("input", "give either input or messages")
        if self.messages:
            if self.messages[-1].role == "assistant" and not (self.messages[-1].item.text or "").strip():
                self.messages.pop()
            if [message.role for message in self.messages] not in (["user"], ["system", "user"]):
                raise PydanticCustomError(
                    "messages", "give one user message, optionally after a system and before an empty assistant message"
                )
        return self

    @property
    def side(self) -> InputType:
        if self.input_type is None:
            return "query" if self.task is None or self.task.endswith("query") else "document"
        return self.input_type

    @property
    def items(self) -> str | Item | list[str | Item]:
        if self.messages is None:
            assert self.input is not None  # checked above
            return self._as_modality(self.input)
        item = self.messages[-1].item
        instruction = self.messages[0].item.text if len(self.messages) > 1 else None
        return item.model_copy(update={"instruction": instruction})

    def _as_modality(self, given: Any) -> Any:
        if self.modality == "text":
            return given
        if isinstance(given, list):
            return [self._as_modality(one) for one in given]
        return Item.model_validate({self.modality: given}) if isinstance(given, str) else given


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | list[int] | str = Field(
        description="floats, base64 of little-endian float32, or eight signs per byte"
    )


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    errors: list[ItemError] = Field(default=[], description="the items left out with `on_error: skip`")


@router.post("/v1/embeddings")
@router.post("/embeddings", include_in_schema=False)
async def embeddings(body: EmbeddingsRequest, backend: Served) -> EmbeddingsResponse:
    """Unit vectors, one per item, in order."""
    model = backend.embedder
    check_model(body.model, model)
    read = await backend.read(body.items, "messages" if body.messages else "input")
    kept, errors = split_bad(await backend.embed(read, body.side), body.on_error)
    return EmbeddingsResponse(
        data=[
            Embedding(index=number, embedding=wire_vector(shorten(one.vector, body.dimensions), body.encoding_format))
            for number, one in kept
        ],
        model=model.name,
        usage=usage_of(one.tokens for _, one in kept),
        errors=errors,
    )


class Pooling(BaseModel):
    object: Literal["pooling"] = "pooling"
    index: int
    data: list[float] | list[int] | str


class PoolingResponse(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooling]
    usage: Usage


@router.post("/pooling")
async def pooling(body: EmbeddingsRequest, backend: Served) -> PoolingResponse:
    """The same vectors in the response of vLLM's pooling route."""
    found = await embeddings(body, backend)
    return PoolingResponse(
        id=f"pool-{uuid.uuid4()}",
        created=int(time.time()),
        model=found.model,
        data=[Pooling(index=one.index, data=one.embedding) for one in found.data],
        usage=found.usage,
    )


def shorten(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The vector's first `dimensions` coordinates, scaled to unit norm; None or 0: the whole vector.

    Raises:
        BadItem: the model has fewer dimensions.
    """
    if not dimensions:
        return vector
    if dimensions > len(vector):
        raise BadItem(f"dimensions: {dimensions}; the model has only {len(vector)}", "dimensions")
    return truncate(torch.from_numpy(vector)[None], dimensions)[0].numpy()


def wire_vector(vector: np.ndarray, encoding: str) -> Any:
    """One embedding as JSON.

    Args:
        encoding: "float"; "base64" of little-endian float32, as OpenAI's; "binary" or "ubinary", eight signs per byte,
            the first as the highest bit; "int8" or "uint8", the vector stretched to the type's range.
    """
    if encoding == "float":
        return vector.tolist()
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    if encoding in ("int8", "uint8"):
        stretched = np.rint(127 * vector / max(np.abs(vector).max(), 1e-12)).astype(np.int16)
        return (stretched + 128 * (encoding == "uint8")).tolist()
    packed = np.packbits(vector > 0).astype(np.int16)
    return (packed - 128 * (encoding == "binary")).tolist()
