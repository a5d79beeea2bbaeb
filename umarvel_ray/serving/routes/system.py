"""What operators ask: is it ready, what does it serve, how is it doing."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import ray
from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse
from ray import serve

from umarvel_ray.serving.routes.common import Served

router = APIRouter(tags=["system"])
METRICS_TIMEOUT_S = 5


@router.get("/health")
async def health() -> JSONResponse:
    """200 when every deployment has a replica with its model loaded and warmed up, else 503."""
    status = await asyncio.to_thread(serve.status)
    deployments = status.applications[serve.get_replica_context().app_name].deployments
    waiting = sorted(name for name, state in deployments.items() if not state.replica_states.get("RUNNING"))
    answer = {"status": "starting" if waiting else "ok", "waiting_for": waiting}
    return JSONResponse(answer, 503 if waiting else 200)


@router.get("/v1/models")
async def models(backend: Served) -> dict[str, Any]:
    """The checkpoints' folder names; `identity` is a digest of weights and settings."""
    data = [
        {"id": model.name, "object": "model", "owned_by": "umarvel", "identity": model.held.identity}
        for model in backend.models
    ]
    return {"object": "list", "data": data}


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def metrics() -> PlainTextResponse:
    """Prometheus' text format: what Ray's agents on all nodes have collected of Ray, Serve and this service."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"] and node["MetricsExportPort"]]
    addresses = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(METRICS_TIMEOUT_S)) as session:
        pages = await asyncio.gather(*(_page(session, address) for address in addresses))
    return PlainTextResponse("".join(pages), media_type="text/plain; version=0.0.4")


async def _page(session: aiohttp.ClientSession, address: str) -> str:
    try:
        async with session.get(address) as answer:
            return await answer.text()
    except (aiohttp.ClientError, TimeoutError):
        return ""  # a node that went away: the others' figures still count
