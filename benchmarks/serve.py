# ruff: noqa: E402
"""Serving mixed items over HTTP on the CPU: our service, a plain deployment, and the library in-process.

- raw: `Embedder.encode_document` in a process without a server, all items in one call;
- ours: the service of serve/config.yaml without reranker and index, with its cache off;
- plain: a `@serve.deployment` that does the same for one request at a time;
- empty: two chained deployments that read a request and do nothing, which is the cost of Serve itself.

The client is a separate process (common/load_client.py). Each round measures requests of 16 items from 4 clients,
single items from 32 clients, and short texts one by one against the model's own time for them. At the end, single items
arrive at random at 60 % of the raw rate (open loop).

    python -m benchmarks.serve [items=384] [rounds=3]           → benchmarks/results/serve.json
    RAY_SERVE_ENABLE_HA_PROXY=1 python -m benchmarks.serve      → benchmarks/results/serve-haproxy.json
    python -m benchmarks.serve items=2048 gpu=1                 → serve-gpu.json there: Qwen2-VL-2B's layers, bf16
"""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from umarvel_ray.ray_session import prepare_environment, start_ray

prepare_environment()  # before ray is imported

import numpy as np
import torch
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request

from benchmarks.common.gpu_model import config_of, rope_of
from benchmarks.common.items import ItemMaker
from benchmarks.common.results import integer_arguments, print_table, write_result
from benchmarks.common.small_model import SETTINGS, SHAPE, make_model
from umarvel_ray import Embedder
from umarvel_ray.model.checkpoint import save_checkpoint
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.serving.app import build
from umarvel_ray.serving.settings import Service

GROUP, CLIENTS, SINGLES = 16, 4, 32
OPEN_LOOP_SHARE = 0.6  # of the raw rate
SHORT_TEXTS = 40
TEXT_ROUNDS = 3  # per round, because latencies of milliseconds vary more
PORT = 8017
TARGETS = {"16 items: ours / raw": 0.8, "single items: ours / raw": 0.5, "single items: ours / plain": 1.5}
TARGETS_GPU = {"16 items: ours / raw": 0.85, "single items: ours / plain": 5}
GPU_SHAPE = "Qwen2-VL-2B's layers, random weights, bf16; a picture is up to 100 tokens"
TARGET_OVERHEAD_MS = 10
# The plain deployment keeps Serve's default, which `prepare_environment` changes for ours.
DEFAULTS = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "1"}
NO_ACCESS_LOG = {"enable_access_log": False}  # Serve's own, as in serve/config.yaml


@ray_serve.deployment(
    max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.5, "runtime_env": {"env_vars": DEFAULTS}}
)
class Plain:
    """The obvious deployment: each request is read, embedded and answered before the next."""

    def __init__(self, path: str, device: str, dtype: str) -> None:
        torch.set_num_threads(torch.multiprocessing.cpu_count())
        self._embedder = Embedder.from_pretrained(path, device, dtype)

    async def __call__(self, request: Request) -> dict[str, Any]:
        items = (await request.json())["input"]
        for item in items:
            if "image" in item:
                item["image"] = base64.b64decode(item["image"].partition(",")[2])
        return {"data": [{"embedding": vector.tolist()} for vector in self._embedder.encode_document(items)]}


@ray_serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Nothing:
    async def __call__(self, items: list) -> int:
        return len(items)


@ray_serve.deployment(max_ongoing_requests=100, ray_actor_options={"num_cpus": 0.1})
class Empty:
    def __init__(self, next_deployment: DeploymentHandle) -> None:
        self._next = next_deployment

    async def __call__(self, request: Request) -> int:
        return await self._next.remote((await request.json())["input"])


def body(items: list[dict[str, str]]) -> str:
    """A request body as clients send it, with pictures as data URIs."""
    inputs = [
        item | {"image": "data:image/jpeg;base64," + base64.b64encode(Path(item["image"]).read_bytes()).decode()}
        if "image" in item
        else item
        for item in items
    ]
    return json.dumps({"input": inputs, "input_type": "document"})


def load(url: str, bodies: list[str], folder: Path, **pattern: float) -> dict[str, Any]:
    """Run the client; what it prints: latencies, seconds and failed requests.

    Args:
        pattern: `clients` or `per_second`, see common/load_client.py.
    """
    file = folder / "bodies.json"
    file.write_text(json.dumps(bodies))
    request = json.dumps({"url": url, "bodies": str(file), **pattern})
    client = [sys.executable, str(Path(__file__).parent / "common" / "load_client.py")]
    return json.loads(subprocess.run(client, input=request, capture_output=True, text=True, check=True).stdout)


def percentiles(latencies: list[float]) -> dict[str, float]:
    return {f"p{at}_ms": float(1000 * np.percentile(latencies, at)) for at in (50, 99)}


def batch_fill(address: str) -> dict[str, float]:
    """Mean requests and tokens per batch since the service started, from its /metrics."""
    page = urllib.request.urlopen(f"{address}/metrics").read().decode().splitlines()
    sums = dict.fromkeys(("umarvel_batches", "umarvel_batch_requests", "umarvel_batch_tokens"), 0.0)
    for line in page:
        for name in sums:
            if line.startswith((f"ray_{name}{{", f"ray_{name}_total{{")):
                sums[name] += float(line.rsplit(" ", 1)[1])
    batches = sums["umarvel_batches"]
    return {name: sums[f"umarvel_batch_{name}"] / batches for name in ("requests", "tokens")}


def make_checkpoint(folder: Path, gpu: bool) -> Path:
    """The small model, or the layers of Qwen2-VL-2B with the same tokenizer and patches."""
    if gpu:
        config = config_of("2b")
        text = config["text_config"] | {"rope_parameters": rope_of(config["text_config"])}
        base = make_model(folder / "base", text, config["vision_config"], "bfloat16")
    else:
        base = make_model(folder / "base")
    save_checkpoint(EmbeddingModel.from_pretrained(base, SETTINGS), folder / "bench", SETTINGS, {})
    return folder / "bench"


def main(items: int = 384, rounds: int = 3, gpu: int = 0) -> None:
    with tempfile.TemporaryDirectory() as name, start_ray():
        folder = Path(name)
        maker = ItemMaker(folder / "pictures")
        made = maker.items(items)
        checkpoint = make_checkpoint(folder, bool(gpu))
        device, dtype = ("cuda", "bfloat16") if gpu else ("cpu", "float32")
        raw = Embedder.from_pretrained(checkpoint, device, dtype)
        ray_serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        address = f"http://127.0.0.1:{PORT}"
        service = Service(embedder=str(checkpoint), device=device, dtype=dtype, cache_mb=0)
        for side, path, app in (
            ("ours", "/", build(service)),
            ("plain", "/plain", Plain.bind(str(checkpoint), device, dtype)),
            ("empty", "/empty", Empty.bind(Nothing.bind())),
        ):
            ray_serve.run(app, name=side, route_prefix=path, logging_config=NO_ACCESS_LOG)
        ours, plain, empty = f"{address}/v1/embeddings", f"{address}/plain", f"{address}/empty"
        groups = [body(made[start : start + GROUP]) for start in range(0, items, GROUP)]
        singles = [body([item]) for item in made]
        texts = [maker.short_text() for _ in range(SHORT_TEXTS)]
        check_answers(ours, groups[0], raw.encode_document(made[:GROUP]), atol=1e-2 if gpu else 1e-5)

        rates: dict[str, list[float]] = {name: [] for name in ("raw", "ours, 16", "ours, 1", "plain, 1", "plain, 16")}
        latencies: dict[str, list[float]] = {}
        text_bodies = [body([{"text": text}]) for text in texts]
        alone: dict[str, list[float]] = {"model": [], "ours": [], "empty": []}  # p50 of a round, ms
        for _ in range(rounds):
            begin = time.perf_counter()
            raw.encode_document(made)
            rates["raw"].append(items / (time.perf_counter() - begin))
            for side, url, bodies, clients in (
                ("ours, 16", ours, groups, CLIENTS),
                ("plain, 16", plain, groups, CLIENTS),
                ("ours, 1", ours, singles, SINGLES),
                ("plain, 1", plain, singles, SINGLES),
            ):
                done = load(url, bodies, folder, clients=clients)
                if done["failed"]:
                    sys.exit(f"{side}: failed with status {set(done['failed'])}")
                rates[side].append(items / done["seconds"])
                latencies.setdefault(side, []).extend(done["latencies"])
                print(f"  {side}: {rates[side][-1]:.1f} items/s", flush=True)
            for _ in range(TEXT_ROUNDS):
                for side, url in (("ours", ours), ("empty", empty)):
                    seconds = load(url, text_bodies, folder, clients=1)["latencies"]
                    alone[side].append(percentiles(seconds)["p50_ms"])
                    latencies.setdefault(f"a text, {side}", []).extend(seconds)
                own = []
                for text in texts:
                    begin = time.perf_counter()
                    raw.encode_document([text])
                    own.append(time.perf_counter() - begin)
                alone["model"].append(percentiles(own)["p50_ms"])
        fill = batch_fill(address)
        rate = OPEN_LOOP_SHARE * statistics.median(rates["raw"])
        for side, url in (("ours, open loop", ours), ("plain, open loop", plain)):
            done = load(url, singles, folder, per_second=rate)
            latencies[side] = done["latencies"]
        ray_serve.shutdown()
    report(items, rates, latencies, fill, alone, bool(gpu))


def check_answers(url: str, request_body: str, expected: np.ndarray, atol: float) -> None:
    request = urllib.request.Request(url, request_body.encode(), {"Content-Type": "application/json"})
    vectors = [row["embedding"] for row in json.load(urllib.request.urlopen(request))["data"]]
    np.testing.assert_allclose(vectors, expected, atol=atol)


def report(
    items: int,
    rates: dict[str, list[float]],
    latencies: dict[str, list[float]],
    fill: dict,
    alone: dict[str, list[float]],
    gpu: bool,
) -> None:
    def ratio(side: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[side], rates[other], strict=True))

    ratios = {
        "16 items: ours / raw": ratio("ours, 16", "raw"),
        "single items: ours / raw": ratio("ours, 1", "raw"),
        "single items: ours / plain": ratio("ours, 1", "plain, 1"),
        "16 items: ours / plain": ratio("ours, 16", "plain, 16"),
    }
    latency = {side: percentiles(seconds) for side, seconds in latencies.items()}
    shape, targets = (GPU_SHAPE, TARGETS_GPU) if gpu else (SHAPE, TARGETS)
    print(f"\n{shape}. {items} items")
    rows = []
    for side in dict.fromkeys([*rates, *latency]):
        cells = [f"{statistics.median(rates[side]):.1f}" if side in rates else ""]
        cells += [f"{value:.0f}" for value in latency.get(side, {}).values()] or ["", ""]
        rows.append((side, *cells))
    print_table(("side", "items/s", "p50 ms", "p99 ms"), rows)
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}" + (f" (target {targets[name]})" if name in targets else ""))
    overhead = statistics.median(ours - own for ours, own in zip(alone["ours"], alone["model"], strict=True))
    print(f"short texts one by one, p50 of each round in ms: {alone}")
    print(f"overhead over the model: {overhead:.1f} ms (target {TARGET_OVERHEAD_MS})")
    print(f"mean batch: {fill}")
    file = "serve-gpu" if gpu else "serve-haproxy" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else "serve"
    figures = {"setting": shape, "items": items, "rates": rates, "latency": latency,
               "ratios": ratios, "targets": targets, "batch": fill,
               "alone": alone, "overhead_ms": overhead}  # fmt: skip
    write_result(file, figures)


if __name__ == "__main__":
    main(**integer_arguments(sys.argv[1:]))
