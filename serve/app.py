"""The service on Ray Serve: an ingress in front of embedder, reranker and search, each a deployment of its own.

`serve run serve/config.yaml` builds it from the paths there. The ingress (CPU) turns clients' items into token ids and
patches, so model replicas only run models. Concurrent requests share batches of `SLOTS` × `SLOT_TOKENS` tokens; a
vector does not depend on its companions (DESIGN rule 1), so every answer equals the library's.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from serve import schemas
from umarvel_ray.errors import UserError
from umarvel_ray.model.checkpoint import load_settings
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.items import EncodedItem, ItemEncoder
from umarvel_ray.model.pairs import EncodedPair, PairEncoder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.recipe import Data
from umarvel_ray.search import RERANK_DEPTH, Corpus, Hit, fuse, picture_uri

SLOT_TOKENS = 64
SLOTS = 64  # a batch is full at 4,096 tokens; each request takes a slot or more, so a batch is at most 64 requests
BATCH_WAIT_S = 0.005
RETRY_AFTER_S = 1

Prepared = TypeVar("Prepared")


class Service(BaseModel):
    """What to serve (`args` in config.yaml). Without a reranker or an index the routes that need them answer 404."""

    model_config = ConfigDict(extra="forbid")

    embedder: str
    reranker: str | None = None
    index: str | None = None
    data: str = "builtin:demo"
    device: str = "cpu"
    dtype: str = "float32"
    rerank_weight: float = 1.0  # search score = cosine + weight · P(yes); evaluation prints the one it chose


def build(args: Service) -> serve.Application:
    """The application; UMARVEL_<FIELD> in the environment overrides a field, an empty value leaves that part out.

    Raises:
        UserError: a path does not exist.
    """
    given = {
        name: os.environ[f"UMARVEL_{name.upper()}"] or None
        for name in Service.model_fields
        if f"UMARVEL_{name.upper()}" in os.environ
    }
    service = Service.model_validate({**args.model_dump(), **given})
    for name in ("embedder", "reranker", "index"):
        path = getattr(service, name)
        if path and not Path(path).is_dir():
            raise UserError(f"serve: {name}: no folder {path}; run `make demo` first or set UMARVEL_{name.upper()}")
    embedder = EmbedderDeployment.bind(service.embedder, service.device, service.dtype)
    reranker = RerankerDeployment.bind(service.reranker, service.device, service.dtype) if service.reranker else None
    search = SearchDeployment.bind(service.index, service.data) if service.index else None
    return Ingress.bind(service, embedder, reranker, search)


def batch_slots(requests: list[list[EncodedItem]]) -> int:
    """How much of a batch these requests fill. A request larger than a batch counts as a full one: it runs alone."""
    slots = sum(-(-sum(item.length for item in items) // SLOT_TOKENS) for items in requests)
    return min(slots, SLOTS) if len(requests) == 1 else slots


@serve.deployment(max_ongoing_requests=SLOTS, max_queued_requests=4 * SLOTS, ray_actor_options={"num_cpus": 0.5})
class EmbedderDeployment:
    """The embedding model; concurrent requests are batched by tokens."""

    def __init__(self, path: str, device: str, dtype: str) -> None:
        self._embedder = Embedder.from_pretrained(path, device=device, dtype=dtype)
        self._embedder.encode_query(["warm-up"])

    async def encode(self, items: list[EncodedItem]) -> np.ndarray:
        """Unit vectors, float32 (n, d)."""
        return await self._encode_batch(items)

    @serve.batch(max_batch_size=SLOTS, batch_wait_timeout_s=BATCH_WAIT_S, batch_size_fn=batch_slots)
    async def _encode_batch(self, requests: list[list[EncodedItem]]) -> list[np.ndarray]:
        everything = [item for items in requests for item in items]
        vectors = await asyncio.to_thread(self._embedder.encode, everything, SLOTS * SLOT_TOKENS)
        ends = np.cumsum([len(items) for items in requests])
        return np.split(vectors, ends[:-1])


@serve.deployment(max_ongoing_requests=8, max_queued_requests=64, ray_actor_options={"num_cpus": 0.5})
class RerankerDeployment:
    """The yes/no model. It batches the candidates of one query, whose prefix is computed once; queries take turns."""

    def __init__(self, path: str, device: str, dtype: str) -> None:
        self._reranker = Reranker.from_pretrained(path, device=device, dtype=dtype)
        self._reranker.score("warm-up", ["warm-up"])
        self._turn = asyncio.Lock()

    async def score(self, query: EncodedPair, documents: list[EncodedPair]) -> np.ndarray:
        """P(yes) per document, float32 (n,)."""
        async with self._turn:
            return await asyncio.to_thread(self._reranker.score_encoded, query, documents)


@serve.deployment(max_ongoing_requests=64, max_queued_requests=256, ray_actor_options={"num_cpus": 0.25})
class SearchDeployment:
    """The index and the documents behind it."""

    def __init__(self, index: str, data: str) -> None:
        self._corpus = Corpus.open(index, Data(root=data))

    async def search(self, vector: np.ndarray, top_k: int) -> list[Hit]:
        return await asyncio.to_thread(self._corpus.search, vector, top_k)


app = FastAPI(title="umarvel-ray", description="Universal multimodal embeddings, reranking and search.")


@app.exception_handler(schemas.BadItem)
async def _bad_item(request: Request, error: schemas.BadItem) -> JSONResponse:
    return _error(400, error.message, "invalid_request_error", error.param, error.index)


@app.exception_handler(RequestValidationError)
async def _bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse(schemas.validation_error(error.errors()), 400)


class Busy(Exception):
    """A deployment's queue is full, or it has no replica just now."""


@app.exception_handler(Busy)
async def _busy(request: Request, error: Busy) -> JSONResponse:
    response = _error(503, "the service is at its limit; try again shortly", "overloaded")
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


class NotServed(Exception):
    """A model or a part that this service does not have."""


@app.exception_handler(NotServed)
async def _not_served(request: Request, error: NotServed) -> JSONResponse:
    return _error(404, str(error), "not_found_error")


def _error(status: int, message: str, kind: str, param: str | None = None, index: int | None = None) -> JSONResponse:
    return JSONResponse(schemas.error_body(message, kind, param, index), status)


# Above `Ingress`, because `serve.ingress` pickles the routes with the names that exist when the class is decorated.


def _prepare(
    encode: Callable[[dict[str, Any], str], Prepared],
    given: str | schemas.Item | Sequence[str | schemas.Item],
    name: str,
) -> list[Prepared]:
    """Encode one item, or each of a list, for the models.

    Raises:
        BadItem: the first item that cannot be used, with its place in the body.
    """
    many = isinstance(given, list)
    prepared = []
    for number, item in enumerate(given if many else [given]):
        index = number if many else None
        where = schemas.place(name, index)
        try:
            prepared.append(encode(schemas.library_item(item, name, index), where))
        except UserError as error:
            raise schemas.BadItem(str(error), where, index) from None
    return prepared


async def _answer(response: DeploymentResponse) -> Any:
    # Serve answers its own overload errors in plain text; ours keep the shape of every other error.
    try:
        return await response
    except (BackPressureError, DeploymentUnavailableError):
        raise Busy from None


def _check_model(asked: str | None, served: str) -> None:
    if asked not in (None, served):
        raise NotServed(f"no model '{asked}' on this route; it serves '{served}'")


def _check_part(part: DeploymentHandle | None, name: str) -> None:
    if part is None:
        raise NotServed(f"this service runs without a {name}; set UMARVEL_{name.upper()} or `{name}` in config.yaml")


def _as_item(item: str | schemas.Item) -> schemas.Item:
    return schemas.Item(text=item) if isinstance(item, str) else item


def _result(hit: Hit, with_document: bool) -> schemas.SearchResult:
    row = hit.document
    document = {"text": row["text"], "image": picture_uri(row["image"])} if with_document else None
    return schemas.SearchResult(
        id=row["id"],
        score=hit.score,
        rerank_score=hit.rerank_score,
        modality=row["modality"],
        source=row["source"],
        # Our own document: the limits on what clients may send do not apply.
        document=document and schemas.Item.model_construct(**document),
    )


@serve.deployment(
    max_ongoing_requests=256,
    max_queued_requests=256,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
    ray_actor_options={"num_cpus": 0.25},
)
@serve.ingress(app)
class Ingress:
    """The routes."""

    def __init__(
        self,
        service: Service,
        embedder: DeploymentHandle,
        reranker: DeploymentHandle | None,
        search: DeploymentHandle | None,
    ) -> None:
        self._embedder, self._reranker, self._search = embedder, reranker, search
        self._rerank_weight = service.rerank_weight
        self._items = ItemEncoder.from_pretrained(service.embedder, load_settings(service.embedder))
        self._embedder_name, self._reranker_name, self._pairs = Path(service.embedder).name, None, None
        if service.reranker:
            settings = load_settings(service.reranker)
            self._pairs = PairEncoder.from_pretrained(service.reranker, settings, settings.max_text_tokens)
            self._reranker_name = Path(service.reranker).name

    @app.get("/health")
    async def health(self) -> JSONResponse:
        """200 when every deployment has a replica with its model loaded and warmed up, else 503."""
        status = await asyncio.to_thread(serve.status)
        deployments = status.applications[serve.get_replica_context().app_name].deployments
        waiting = sorted(name for name, state in deployments.items() if not state.replica_states.get("RUNNING"))
        answer = {"status": "starting" if waiting else "ok", "waiting_for": waiting}
        return JSONResponse(answer, 503 if waiting else 200)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        names = [name for name in (self._embedder_name, self._reranker_name) if name]
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "umarvel"} for name in names]}

    @app.post("/v1/embeddings")
    async def embeddings(self, body: schemas.EmbeddingsRequest) -> schemas.EmbeddingsResponse:
        """Unit vectors, one per item, in order."""
        _check_model(body.model, self._embedder_name)
        encoded = await self._encode(body.input, "input", body.input_type)
        vectors = await _answer(self._embedder.encode.remote(encoded))
        tokens = sum(item.length for item in encoded)
        return schemas.EmbeddingsResponse(
            data=[
                schemas.Embedding(index=index, embedding=schemas.wire_vector(vector, body.encoding_format))
                for index, vector in enumerate(vectors)
            ],
            model=self._embedder_name,
            usage=schemas.Usage(prompt_tokens=tokens, total_tokens=tokens),
        )

    @app.post("/v1/rerank")
    async def rerank(self, body: schemas.RerankRequest) -> schemas.RerankResponse:
        """Documents by P(yes), best first."""
        _check_part(self._reranker, "reranker")
        _check_model(body.model, self._reranker_name)
        documents = await asyncio.to_thread(_prepare, self._pairs.encode_document, body.documents, "documents")
        scores = await self._score(body.query, documents)
        order = np.argsort(-scores, kind="stable")[: body.top_n].tolist()
        return schemas.RerankResponse(
            model=self._reranker_name,
            results=[
                schemas.RerankResult(
                    index=index,
                    relevance_score=scores[index],
                    document=_as_item(body.documents[index]) if body.return_documents else None,
                )
                for index in order
            ],
        )

    @app.post("/v1/search")
    async def search(self, body: schemas.SearchRequest) -> schemas.SearchResponse:
        """The corpus' best documents for a query; with `rerank`, the reranker reads the best of them too."""
        _check_part(self._search, "index")
        if body.rerank:
            _check_part(self._reranker, "reranker")
        clock = [time.perf_counter()]
        encoded = await self._encode(body.query, "query", "query")
        [vector] = await _answer(self._embedder.encode.remote(encoded))
        clock.append(time.perf_counter())
        depth = max(body.top_k, RERANK_DEPTH) if body.rerank else body.top_k
        hits = await _answer(self._search.search.remote(vector, depth))
        clock.append(time.perf_counter())
        if body.rerank:
            items = [hit.item for hit in hits]
            documents = await asyncio.to_thread(lambda: [self._pairs.encode_document(item) for item in items])
            hits = fuse(hits, await self._score(body.query, documents), self._rerank_weight)
        clock.append(time.perf_counter())
        encode, retrieve, rerank = (1000 * np.diff(clock)).tolist()
        return schemas.SearchResponse(
            results=[_result(hit, body.return_documents) for hit in hits[: body.top_k]],
            timings=schemas.Timings(encode_ms=encode, retrieve_ms=retrieve, rerank_ms=rerank),
        )

    async def _encode(self, items: Any, name: str, side: str) -> list[EncodedItem]:
        return await asyncio.to_thread(_prepare, lambda item, where: self._items.encode(item, side, where), items, name)

    async def _score(self, query: str | schemas.Item, documents: list[EncodedPair]) -> np.ndarray:
        [side] = await asyncio.to_thread(_prepare, self._pairs.encode_query, query, "query")
        return await _answer(self._reranker.score.remote(side, documents))
