"""The client of `benchmarks.serve`, run as its own process: sends requests and records every latency.

Reads a JSON object from stdin: `url`; `bodies`, a file with a JSON list of request bodies; and either `clients`
(closed loop: that many at a time) or `per_second` (open loop: Poisson arrivals, independent of the answers). Prints
latencies and total time in seconds, and the status codes other than 200.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from pathlib import Path

import aiohttp


async def post(session: aiohttp.ClientSession, url: str, body: str, latencies: list[float], failed: list[int]) -> None:
    begin = time.perf_counter()
    async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
        await response.read()
    if response.status == 200:
        latencies.append(time.perf_counter() - begin)
    else:
        failed.append(response.status)


async def closed_loop(
    session: aiohttp.ClientSession, url: str, bodies: list[str], clients: int, *outcome: list
) -> None:
    remaining = iter(bodies)

    async def client() -> None:
        for body in remaining:
            await post(session, url, body, *outcome)

    await asyncio.gather(*(client() for _ in range(clients)))


async def open_loop(session: aiohttp.ClientSession, url: str, bodies: list[str], rate: float, *outcome: list) -> None:
    rng, pending = random.Random(0), []
    for body in bodies:
        pending.append(asyncio.create_task(post(session, url, body, *outcome)))
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*pending)


async def main(request: dict) -> dict:
    bodies = json.loads(Path(request["bodies"]).read_text())
    latencies: list[float] = []
    failed: list[int] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        begin = time.perf_counter()
        if "clients" in request:
            await closed_loop(session, request["url"], bodies, request["clients"], latencies, failed)
        else:
            await open_loop(session, request["url"], bodies, request["per_second"], latencies, failed)
        return {"seconds": time.perf_counter() - begin, "latencies": latencies, "failed": failed}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.load(sys.stdin)))))
