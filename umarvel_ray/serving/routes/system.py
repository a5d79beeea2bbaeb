"""Routes for operators: readiness, the models served, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import ray
from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse
from ray import serve

from umarvel_ray.serving.errors import NotServed
from umarvel_ray.serving.routes.common import Served
from umarvel_ray.version import __version__

router = APIRouter(tags=["system"])
METRICS_TIMEOUT_S = 5


@router.get("/health")
async def health() -> JSONResponse:
    """200 once every deployment has a replica with its model loaded and warmed up, 503 until then."""
    status = await asyncio.to_thread(serve.status)
    deployments = status.applications[serve.get_replica_context().app_name].deployments
    waiting = sorted(
        name
        for name, state in deployments.items()
        if not state.replica_states.get("RUNNING")  # type: ignore[call-overload]  # the keys are a string enum
    )
    body = {"status": "starting" if waiting else "ok", "waiting_for": waiting}
    return JSONResponse(body, 503 if waiting else 200)


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(backend: Served) -> dict[str, Any]:
    """The models by folder name; `identity` is a digest of the weights and settings."""
    data = [
        {"id": model.name, "object": "model", "owned_by": "umarvel", "identity": model.current.identity}
        for model in backend.models
    ]
    return {"object": "list", "data": data}


@router.get("/v1/models/{name}")
async def model(name: str, backend: Served) -> dict[str, Any]:
    """One of the models."""
    for served in (await models(backend))["data"]:
        if served["id"] == name:
            return served
    raise NotServed(f"no model '{name[:256]}'; GET /v1/models lists them")


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of umarvel-ray."""
    return {"version": __version__}


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics() -> PlainTextResponse:
    """Metrics of Ray, Serve and this service in Prometheus's text format, collected from Ray's agents on all nodes."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"] and node["MetricsExportPort"]]
    addresses = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(METRICS_TIMEOUT_S)) as session:
        pages = await asyncio.gather(*(_page(session, address) for address in addresses))
    return PlainTextResponse("".join(pages), media_type="text/plain; version=0.0.4")


async def _page(session: aiohttp.ClientSession, address: str) -> str:
    try:
        async with session.get(address) as response:
            return await response.text()
    except (aiohttp.ClientError, TimeoutError):
        return ""  # a node that has left; the metrics of the others still count
