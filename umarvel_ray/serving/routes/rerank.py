"""The rerank routes of Jina and Cohere, and vLLM's score route."""

from __future__ import annotations

import asyncio
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from umarvel_ray.serving.backend import require_good
from umarvel_ray.serving.errors import BadItem
from umarvel_ray.serving.items import Body, Item, Items, OneItem, OneOrMore
from umarvel_ray.serving.routes.common import ItemError, Name, OnError, Served, check_model, split_bad

router = APIRouter(tags=["rerank"])


class RerankRequest(Body):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"query": "a red car", "documents": ["a car", "a dog"]},
                {"query": {"image": "data:image/png;base64,…"}, "documents": ["a car", {"text": "a dog"}], "top_n": 1},
            ]
        }
    )

    query: OneItem
    documents: Items
    model: Name | None = None
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False
    on_error: OnError = "fail"
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="accepted for Cohere clients, ignored: the checkpoint sets the length"
    )


class RerankResult(BaseModel):
    index: int
    relevance_score: float = Field(description="P(yes)")
    document: Item | None = None


class RerankResponse(BaseModel):
    id: str
    model: str
    results: list[RerankResult]
    errors: list[ItemError] = Field(default=[], description="the documents left out with `on_error: skip`")
    meta: dict[str, Any] = {"api_version": {"version": "2"}}


@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(body: RerankRequest, backend: Served) -> RerankResponse:
    """Documents by P(yes), best first."""
    model = backend.reranker
    check_model(body.model, model)
    [query] = require_good(await backend.read(body.query, "query"))
    documents = await backend.read(body.documents, "documents")
    kept, errors = split_bad(await backend.score(query, documents), body.on_error)
    best = sorted(kept, key=lambda pair: -pair[1])[: body.top_n]
    return RerankResponse(
        id=str(uuid.uuid4()),
        model=model.name,
        results=[
            RerankResult(
                index=number,
                relevance_score=score,
                document=_as_item(body.documents[number]) if body.return_documents else None,
            )
            for number, score in best
        ],
        errors=errors,
    )


class ScoreRequest(Body):
    model_config = ConfigDict(
        populate_by_name=True,
        json_schema_extra={"examples": [{"queries": "a red car", "documents": ["a car", "a dog"]}]},
    )

    queries: OneOrMore = Field(
        validation_alias=AliasChoices("queries", "text_1"), description="one for all documents, or one per document"
    )
    documents: OneOrMore = Field(validation_alias=AliasChoices("documents", "text_2"))
    model: Name | None = None


class Score(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(BaseModel):
    id: str
    object: Literal["list"] = "list"
    model: str
    data: list[Score]


@router.post("/v1/score")
async def score(body: ScoreRequest, backend: Served) -> ScoreResponse:
    """P(yes) of pairs, in order: one query with every document, or each query with the document at its position.

    With the embedder's name as `model`, the scores are cosines.
    """
    queries = require_good(await backend.read(body.queries, "queries"))
    documents = require_good(await backend.read(body.documents, "documents"))
    if len(queries) not in (1, len(documents)):
        raise BadItem(
            f"queries: {len(queries)} for {len(documents)} documents; give one query, or one per document", "queries"
        )
    if body.model == backend.embedder.name:
        embedded = await asyncio.gather(backend.embed(queries, "query"), backend.embed(documents, "document"))
        left, right = map(require_good, embedded)
        left *= 1 if len(left) > 1 else len(right)
        scores = [float(q.vector @ d.vector) for q, d in zip(left, right, strict=True)]
        name = backend.embedder.name
    else:
        check_model(body.model, backend.reranker)
        name = backend.reranker.name
        groups = [documents] if len(queries) == 1 else [[document] for document in documents]
        scored = await asyncio.gather(*(backend.score(*pair) for pair in zip(queries, groups, strict=True)))
        scores = [score for group in scored for score in require_good(group)]
    return ScoreResponse(
        id=str(uuid.uuid4()), model=name, data=[Score(index=i, score=score) for i, score in enumerate(scores)]
    )


def _as_item(item: str | Item) -> Item:
    return Item(text=item) if isinstance(item, str) else item
