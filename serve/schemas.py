"""Request and response shapes: OpenAI for embeddings, Jina/Cohere for rerank, our own for search (no standard exists).

An item is a bare string (text) or `{"text"?, "image"?, "instruction"?}`. Pictures arrive as data URIs or bare base64
and become bytes here, so nothing behind this module ever sees a path or a URL chosen by a client.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MAX_ITEMS = 96  # as Cohere
MAX_TEXT = 32_768  # characters
MAX_IMAGE = 28_000_000  # base64 characters, 20 MiB of picture

Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]


class Body(BaseModel):
    """A request: unknown keys are refused, so a misspelt option is an answer and not a surprise."""

    model_config = ConfigDict(extra="forbid")


class Item(Body):
    """Text, picture or both; an instruction says what to look for (queries only)."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "a red car", "instruction": "Find a picture."}]})

    text: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    image: Annotated[str, Field(max_length=MAX_IMAGE, description="data URI or base64")] | None = None
    instruction: Annotated[str, Field(max_length=MAX_TEXT)] | None = None

    @model_validator(mode="after")
    def _something(self) -> Item:
        if not self.text and not self.image:
            raise PydanticCustomError("empty_item", "an item needs text or image")
        return self


# The branch is chosen by the JSON type, so a bad item gets one complaint, about the branch that was meant. The tags
# hold spaces because `validation_error` tells them from keys by that.
_TAGS = {str: "a string", dict: "an item", Item: "an item", list: "a list"}
_String, _Item = Annotated[Text, Tag("a string")], Annotated[Item, Tag("an item")]
OneItem = Annotated[
    _String | _Item,
    Discriminator(
        lambda value: _TAGS.get(type(value)),
        custom_error_type="item",
        custom_error_message="give a string or an item {text, image, instruction}",
    ),
]
Items = Annotated[list[OneItem], Field(min_length=1, max_length=MAX_ITEMS)]
OneOrMore = Annotated[
    _String | _Item | Annotated[Items, Tag("a list")],
    Discriminator(
        lambda value: _TAGS.get(type(value)),
        custom_error_type="items",
        custom_error_message="give a string, an item {text, image, instruction}, or a list of them",
    ),
]


class EmbeddingsRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "distillation", "input": ["a red car"], "input_type": "document"}]}
    )

    input: OneOrMore
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    input_type: Literal["query", "document"] = "query"
    user: str | None = Field(default=None, description="accepted for OpenAI clients, ignored")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="floats, or base64 of little-endian float32")


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class RerankRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "a red car", "documents": ["a car", "a dog"]}]})

    query: OneItem
    documents: Items
    model: str | None = None
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool = False


class RerankResult(BaseModel):
    index: int
    relevance_score: float = Field(description="the model's P(yes)")
    document: Item | None = None


class RerankResponse(BaseModel):
    model: str
    results: list[RerankResult]


class SearchRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"query": {"text": "a red car"}, "top_k": 5}]})

    query: OneItem
    top_k: int = Field(default=10, ge=1, le=100)
    rerank: bool = False
    return_documents: bool = Field(default=False, description="give each result's text and picture (data URI) back")


class SearchResult(BaseModel):
    id: str
    score: float = Field(description="cosine, plus the weighted P(yes) when reranked; best first")
    rerank_score: float | None = Field(default=None, description="P(yes)")
    modality: str
    source: str
    document: Item | None = None


class Timings(BaseModel):
    encode_ms: float
    retrieve_ms: float
    rerank_ms: float


class SearchResponse(BaseModel):
    results: list[SearchResult]
    timings: Timings


class BadItem(Exception):
    """An item that cannot be used; `param` is its place in the body, as `input[3].image`."""

    def __init__(self, message: str, param: str, index: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.index = message, param, index


def place(name: str, index: int | None) -> str:
    """The place of an item in the body: `query`, or `documents[3]`."""
    return name if index is None else f"{name}[{index}]"


def library_item(item: str | Item, name: str, index: int | None) -> dict[str, Any]:
    """The library's item dict for a client's item; the picture is bytes, still undecoded.

    Raises:
        BadItem: the picture is a URL, a path, or not base64.
    """
    if isinstance(item, str):
        return {"text": item}
    parts = item.model_dump(exclude_none=True)
    if "image" in parts:
        parts["image"] = _image_bytes(parts["image"], f"{place(name, index)}.image", index)
    return {key: value for key, value in parts.items() if value}


def _image_bytes(image: str, param: str, index: int | None) -> bytes:
    header, comma, payload = image.partition(",")
    if comma and not (header.startswith("data:image/") and header.endswith(";base64")):
        raise BadItem(f"{param}: a data URI must start with data:image/…;base64,", param, index)
    try:
        return base64.b64decode(payload if comma else image, validate=True)
    except (binascii.Error, ValueError):
        message = f"{param}: send a data URI or base64; this service reads no URLs and no paths"
        raise BadItem(message, param, index) from None


def wire_vector(vector: np.ndarray, encoding: Literal["float", "base64"]) -> list[float] | str:
    """One embedding as JSON floats, or as OpenAI's base64 of little-endian float32."""
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def error_body(message: str, kind: str, param: str | None = None, index: int | None = None) -> dict[str, Any]:
    """OpenAI's error object; `index` is the offending item's place in its list."""
    return {"error": {"message": message, "type": kind, "param": param, "index": index, "code": None}}


def validation_error(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line from pydantic's list of complaints, whose places start with "body"."""
    if errors[0]["type"] == "json_invalid":  # its place is a character's, not an item's
        return error_body("body: not valid JSON", "invalid_request_error", "body")
    keys = [part for part in errors[0]["loc"][1:] if isinstance(part, int) or " " not in part]
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".") or "body"
    index = next((key for key in keys if isinstance(key, int)), None)
    return error_body(f"{param}: {errors[0]['msg']}", "invalid_request_error", param, index)
