"""The search route; there is no standard format to follow."""

from __future__ import annotations

import asyncio
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from umarvel_ray.index.hits import Hit, media_bytes
from umarvel_ray.index.labels import Filters
from umarvel_ray.items.images import one_or_several, picture_file, picture_uris, pictures_of
from umarvel_ray.serving.backend import Backend, require_good
from umarvel_ray.serving.errors import NotServed
from umarvel_ray.serving.fields import Body
from umarvel_ray.serving.items import Item, OneItem
from umarvel_ray.serving.metadata import MetadataName, MetadataValue
from umarvel_ray.serving.routes.common import Name, Served

router = APIRouter(tags=["search"])

PICTURE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "private, no-cache",
}


class Filter(Body):
    """Restricts the results to documents that have one of the values given under each name.

    Unknown keys are errors here: a misspelled one would find what it should have left out.
    """

    model_config = ConfigDict(extra="forbid")

    modality: Annotated[list[Name], Field(min_length=1)] | None = Field(default=None, examples=[["image"]])
    source: Annotated[list[Name], Field(min_length=1)] | None = None
    metadata: Annotated[
        dict[MetadataName, Annotated[list[MetadataValue], Field(min_length=1, max_length=256)]], Field(max_length=16)
    ] = Field(default={}, description="added with documents, or further columns of the corpus")

    @property
    def labels(self) -> Filters:
        given: dict[str, list[str] | None] = {"modality": self.modality, "source": self.source}
        return {**self.metadata, **{name: values for name, values in given.items() if values is not None}}


class SearchRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": {"text": "a red car"}, "top_k": 5},
                {"query": "a red car", "rerank": True, "filter": {"modality": ["image"]}},
            ]
        }
    )

    query: OneItem
    top_k: int = Field(default=10, ge=1, le=100)
    rerank: bool = False
    filter: Filter = Filter()
    after: int = Field(default=0, ge=0, description="`sequence` of a commit that the results must reflect")
    return_documents: bool = Field(
        default=False,
        description="include each result's text and picture (as a data URI, as long as they fit in an answer)",
    )


class SearchResult(BaseModel):
    id: str
    score: float = Field(description="cosine, plus weighted P(yes) if reranked; best first")
    rerank_score: float | None = Field(default=None, description="P(yes)")
    modality: str
    source: str
    image_url: str | None = Field(default=None, description="path of the document's picture, or of its first one")
    image_urls: list[str] = Field(default=[], description="paths of all its pictures")
    document: Item | None = None


class Timings(BaseModel):
    encode_ms: float
    retrieve_ms: float
    rerank_ms: float


class SearchResponse(BaseModel):
    results: list[SearchResult]
    timings: Timings


@router.get("/v1/documents/{id_:path}/image", response_class=Response)
async def image(id_: str, backend: Served, n: Annotated[int, Query(ge=0)] = 0) -> Response:
    """A document's picture; of several the one with number `n`, counted from 0."""
    [document] = await backend.documents([id_])
    pictures = pictures_of(document["image"])[n : n + 1] if document else []
    found = await asyncio.to_thread(picture_file, pictures[0]) if pictures else None
    if found is None:
        raise NotServed("no document with this id, or it has no such picture")
    kind, content = found
    return Response(content, media_type=f"image/{kind}", headers=PICTURE_HEADERS)


class OneInstruction(BaseModel):
    """What a kind of the data's queries asks for."""

    instruction: str
    task: str
    query: str = Field(description="modality of the queries")
    finds: str = Field(description="modality of the documents that they look for")


class InstructionsResponse(BaseModel):
    data: list[OneInstruction]


@router.get("/v1/instructions")
async def instructions(backend: Served) -> InstructionsResponse:
    """The instructions that the data's own queries carry: the most frequent of each kind of each task."""
    return InstructionsResponse(
        data=[
            OneInstruction(instruction=one.text, task=one.task, query=one.query, finds=one.finds)
            for one in await backend.instructions()
        ]
    )


@router.post("/v1/search")
async def search(body: SearchRequest, request: Request, backend: Served) -> SearchResponse:
    """The best documents for a query. With `rerank`, the reranker scores the nearest ones again."""
    [query] = require_good(await backend.read(body.query, "query"))
    hits, timings = await backend.search(query, body.top_k, body.rerank, body.filter.labels, body.after)
    root = request.scope.get("root_path", "").rstrip("/")
    results = [_result(hit, root) for hit in hits]
    if body.return_documents:
        await _fill(results, hits, backend)
    return SearchResponse(results=results, timings=Timings(**timings))


def _result(hit: Hit, root: str) -> SearchResult:
    row = hit.document
    first = f"{root}/v1/documents/{quote(row['id'], safe='')}/image"
    urls = [first, *(f"{first}?n={number}" for number in range(1, hit.pictures))] if hit.pictures else []
    return SearchResult(
        id=row["id"],
        score=hit.score,
        rerank_score=hit.rerank_score,
        modality=row["modality"],
        source=row["source"],
        image_url=next(iter(urls), None),
        image_urls=urls,
    )


async def _fill(results: list[SearchResult], hits: list[Hit], backend: Backend) -> None:
    """Give the results their documents, with pictures as long as these fit in an answer."""
    left, whole = backend.limits.max_answer_bytes, list[Hit]()
    async for part in backend.with_media(hits):
        whole += part
        if sum(media_bytes(hit.document) for hit in whole) > left:
            break
    for result, hit in zip(results, [*whole, *hits[len(whole) :]], strict=True):
        left -= media_bytes(hit.document)
        shown = hit.document.get("image") if left >= 0 else None
        image = one_or_several(picture_uris(shown, hit.document["id"]))
        result.document = Item(text=hit.document["text"], image=image)
