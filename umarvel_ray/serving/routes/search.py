"""The search route; there is no standard format to follow."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from umarvel_ray.index.hits import Hit
from umarvel_ray.index.labels import Filters
from umarvel_ray.items.images import picture_uri
from umarvel_ray.serving.backend import require_good
from umarvel_ray.serving.fields import Body
from umarvel_ray.serving.items import Item, OneItem
from umarvel_ray.serving.metadata import MetadataName, MetadataValue
from umarvel_ray.serving.routes.common import Name, Served

router = APIRouter(tags=["search"])


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
    return_documents: bool = Field(default=False, description="include each result's text and picture (as a data URI)")


class SearchResult(BaseModel):
    id: str
    score: float = Field(description="cosine, plus weighted P(yes) if reranked; best first")
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


@router.post("/v1/search")
async def search(body: SearchRequest, backend: Served) -> SearchResponse:
    """The best documents for a query. With `rerank`, the reranker scores the nearest ones again."""
    [query] = require_good(await backend.read(body.query, "query"))
    hits, timings = await backend.search(query, body.top_k, body.rerank, body.filter.labels, body.after)
    return SearchResponse(results=[_result(hit, body.return_documents) for hit in hits], timings=Timings(**timings))


def _result(hit: Hit, with_document: bool) -> SearchResult:
    row = hit.document
    return SearchResult(
        id=row["id"],
        score=hit.score,
        rerank_score=hit.rerank_score,
        modality=row["modality"],
        source=row["source"],
        document=Item(text=row["text"], image=picture_uri(row["image"])) if with_document else None,
    )
