"""The client of benchmarks/serve.py, in a process of its own: sends requests, keeps every latency.

Reads one JSON line from stdin: url; bodies (the file with a JSON list of request bodies); and `clients` (closed loop:
so many at a time) or `per_second` (open loop: Poisson arrivals, whatever the answers do). Prints latencies in seconds,
the total, and what was not answered 200.
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
    async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as answer:
        await answer.read()
    (latencies if answer.status == 200 else failed).append(
        time.perf_counter() - begin if answer.status == 200 else answer.status
    )


async def closed_loop(session: aiohttp.ClientSession, url: str, bodies: list[str], clients: int, *found: list) -> None:
    left = iter(bodies)

    async def client() -> None:
        for body in left:
            await post(session, url, body, *found)

    await asyncio.gather(*(client() for _ in range(clients)))


async def open_loop(session: aiohttp.ClientSession, url: str, bodies: list[str], rate: float, *found: list) -> None:
    draw, waiting = random.Random(0), []
    for body in bodies:
        waiting.append(asyncio.create_task(post(session, url, body, *found)))
        await asyncio.sleep(draw.expovariate(rate))
    await asyncio.gather(*waiting)


async def main(asked: dict) -> dict:
    bodies, found = json.loads(Path(asked["bodies"]).read_text()), ([], [])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        begin = time.perf_counter()
        if "clients" in asked:
            await closed_loop(session, asked["url"], bodies, asked["clients"], *found)
        else:
            await open_loop(session, asked["url"], bodies, asked["per_second"], *found)
        return {"seconds": time.perf_counter() - begin, "latencies": found[0], "failed": found[1]}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.load(sys.stdin)))))
