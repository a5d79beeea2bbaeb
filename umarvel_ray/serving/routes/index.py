"""Adding documents to the index, and deleting them."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from umarvel_ray.index.records import Add
from umarvel_ray.serving.fields import Body
from umarvel_ray.serving.items import Item, Strings
from umarvel_ray.serving.metadata import MetadataName, MetadataValue
from umarvel_ray.serving.routes.common import ItemError, OnError, Served, split_bad

router = APIRouter(tags=["index"])

Id = Annotated[str, StringConstraints(min_length=1, max_length=512)]


class Document(Body):
    """A searchable document: text, pictures, or both. It replaces any document that has the same id.

    Unknown keys are errors here: what stands under a misspelled one would be lost.
    """

    model_config = ConfigDict(extra="forbid")

    id: Id
    text: str | None = None
    image: Strings | None = Field(default=None, description="data URI, base64, or a URL of an allowed host")
    source: Annotated[str, StringConstraints(max_length=512)] = Field(default="added", description="label to filter by")
    metadata: Annotated[dict[MetadataName, MetadataValue], Field(max_length=16)] = Field(
        default={}, description="further labels to filter by", examples=[{"language": "en", "year": 2024}]
    )


class AddRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"documents": [{"id": "car-1", "text": "a red car", "source": "notes"}]}]}
    )

    documents: Annotated[list[Document], Field(min_length=1)]
    on_error: OnError = "fail"


class AddResponse(BaseModel):
    sequence: int = Field(description="number of the commit; a search with this as `after` sees it")
    added: int
    replaced: int
    errors: list[ItemError] = Field(default=[], description="the documents left out with `on_error: skip`")


class DeleteRequest(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"ids": ["car-1"]}]})

    ids: Annotated[list[Id], Field(min_length=1)]


class DeleteResponse(BaseModel):
    sequence: int
    deleted: int
    unknown: list[str]


class IndexResponse(BaseModel):
    documents: int
    sequence: int = Field(description="number of the last commit that the responding replica has read")
    behind_s: float = Field(description="seconds since that replica last read the commits; under 1 unless it cannot")
    writable: bool


@router.get("/v1/index")
async def index(backend: Served) -> IndexResponse:
    """The size and state of the index."""
    state = await backend.index_state()
    return IndexResponse(**state._asdict(), writable=backend.writable)


@router.post("/v1/index")
async def add(body: AddRequest, backend: Served) -> AddResponse:
    """Embed documents and add them. They are on disk when this responds, and every search finds them a moment later."""
    items: list[str | Item] = [Item(text=document.text, image=document.image) for document in body.documents]

    def record(number: int, item: dict[str, Any], vector: np.ndarray) -> Add:
        document = body.documents[number]
        modality = ",".join(name for name in ("image", "text") if name in item)
        content = {name: item.get(name) for name in ("text", "image")}
        return Add(document.id, vector, modality, document.source, **content, metadata=document.metadata)

    read = await backend.read(items, "documents")
    embedded, done = await backend.add(read, record, body.on_error == "skip")
    _, errors = split_bad(embedded, "skip")
    replaced = sum(done.existed)
    return AddResponse(sequence=done.sequence, added=len(done.existed) - replaced, replaced=replaced, errors=errors)


@router.post("/v1/index/delete")
async def delete(body: DeleteRequest, backend: Served) -> DeleteResponse:
    """Delete documents. This is on disk when it responds, and no search finds them a moment later."""
    done = await backend.delete(body.ids)
    unknown = [id_ for id_, existed in zip(body.ids, done.existed, strict=True) if not existed]
    return DeleteResponse(sequence=done.sequence, deleted=sum(done.existed), unknown=unknown)
