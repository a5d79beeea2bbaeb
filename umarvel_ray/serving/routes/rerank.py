"""The rerank routes of Jina, Cohere, vLLM and TEI, and vLLM's score route."""

from __future__ import annotations

import asyncio
import math
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import AliasChoices, BaseModel, ConfigDict, Discriminator, Field, Tag

from umarvel_ray.serving.backend import require_good
from umarvel_ray.serving.errors import BadItem
from umarvel_ray.serving.fields import Body
from umarvel_ray.serving.items import Item, ItemsOrParts, OneOrMoreOrParts, OneOrParts, plain
from umarvel_ray.serving.routes.common import (
    ItemError,
    Name,
    OnError,
    Served,
    Usage,
    check_model,
    split_bad,
    usage_of,
)

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

    query: OneOrParts
    documents: ItemsOrParts
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
    usage: Usage
    meta: dict[str, Any] = {"api_version": {"version": "2"}}


@router.post("/v1/rerank", response_model_exclude_none=True)
@router.post("/v2/rerank", response_model_exclude_none=True)
async def rerank(body: RerankRequest, backend: Served) -> RerankResponse:
    """Documents by P(yes), best first."""
    model = backend.reranker
    check_model(body.model, model)
    [query] = require_good(await backend.read(plain(body.query), "query"))
    given = plain(body.documents)
    kept, errors = split_bad(await backend.score(query, await backend.read(given, "documents")), body.on_error)
    best = sorted(kept, key=lambda pair: -pair[1].p_yes)[: body.top_n]
    return RerankResponse(
        id=str(uuid.uuid4()),
        model=model.name,
        results=[
            RerankResult(
                index=number,
                relevance_score=scored.p_yes,
                document=_as_item(given[number]) if body.return_documents else None,
            )
            for number, scored in best
        ],
        errors=errors,
        usage=usage_of(scored.tokens for _, scored in kept),
    )


class TeiRequest(Body):
    """The rerank request of Hugging Face's Text Embeddings Inference."""

    query: str
    texts: Annotated[list[str], Field(min_length=1, fail_fast=True)]
    raw_scores: bool = Field(default=False, description="the logit of P(yes) instead")
    return_text: bool = False


class TeiResult(BaseModel):
    index: int
    score: float
    text: str | None = None


def _written_for(body: Any) -> str:
    return "tei" if isinstance(body, TeiRequest) or (isinstance(body, dict) and "texts" in body) else "others"


@router.post("/rerank", response_model_exclude_none=True)
async def rerank_unprefixed(
    body: Annotated[
        Annotated[TeiRequest, Tag("tei")] | Annotated[RerankRequest, Tag("others")], Discriminator(_written_for)
    ],
    backend: Served,
) -> list[TeiResult] | RerankResponse:
    """The route of vLLM, infinity and TEI; TEI's requests have `texts`."""
    if isinstance(body, RerankRequest):
        return await rerank(body, backend)
    [query] = require_good(await backend.read(body.query, "query"))
    scored = require_good(await backend.score(query, await backend.read(list(body.texts), "texts")))
    scores = [one.p_yes for one in scored]
    best = sorted(enumerate(scores), key=lambda pair: -pair[1])
    return [
        TeiResult(
            index=number,
            score=_logit(score) if body.raw_scores else score,
            text=body.texts[number] if body.return_text else None,
        )
        for number, score in best
    ]


class ScoreRequest(Body):
    model_config = ConfigDict(
        populate_by_name=True,
        json_schema_extra={"examples": [{"queries": "a red car", "documents": ["a car", "a dog"]}]},
    )

    queries: OneOrMoreOrParts = Field(
        validation_alias=AliasChoices("queries", "text_1", "data_1"),
        description="one for all documents, or one per document",
    )
    documents: OneOrMoreOrParts = Field(validation_alias=AliasChoices("documents", "text_2", "data_2"))
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
    usage: Usage


@router.post("/v1/score")
@router.post("/score", include_in_schema=False)
async def score(body: ScoreRequest, backend: Served) -> ScoreResponse:
    """P(yes) of pairs, in order: one query with every document, or each query with the document at its position.

    With the embedder's name as `model`, the scores are cosines.
    """
    queries = require_good(await backend.read(plain(body.queries), "queries"))
    documents = require_good(await backend.read(plain(body.documents), "documents"))
    if len(queries) not in (1, len(documents)):
        raise BadItem(
            f"queries: {len(queries)} for {len(documents)} documents; give one query, or one per document", "queries"
        )
    if body.model == backend.embedder.name:
        embedded = await asyncio.gather(backend.embed(queries, "query"), backend.embed(documents, "document"))
        left, right = map(require_good, embedded)
        usage = usage_of(one.tokens for one in (*left, *right))
        left *= 1 if len(left) > 1 else len(right)
        scores = [float(q.vector @ d.vector) for q, d in zip(left, right, strict=True)]
        name = backend.embedder.name
    else:
        check_model(body.model, backend.reranker)
        name = backend.reranker.name
        groups = [documents] if len(queries) == 1 else [[document] for document in documents]
        scored = await backend.score_groups(list(zip(queries, groups, strict=True)))
        pairs = [one for group in scored for one in require_good(group)]
        scores, usage = [one.p_yes for one in pairs], usage_of(one.tokens for one in pairs)
    return ScoreResponse(
        id=str(uuid.uuid4()),
        model=name,
        data=[Score(index=i, score=score) for i, score in enumerate(scores)],
        usage=usage,
    )


def _logit(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))


def _as_item(item: str | Item) -> Item:
    return Item(text=item) if isinstance(item, str) else item
