"""Request bodies: counted before they are parsed, and read before they take anybody's place."""

import asyncio
import json
from itertools import pairwise

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from umarvel_ray.serving.auth import Keys
from umarvel_ray.serving.bodies import JsonSize
from umarvel_ray.serving.middleware import guard
from umarvel_ray.serving.settings import Limits

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a,[{"\\\n\u00e9\ud800', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='k"\\,', max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


def parts_of(value) -> int:
    """Values of a document, its keys among them."""
    if isinstance(value, dict):
        return 1 + sum(1 + parts_of(own) for own in value.values())
    return 1 + sum(map(parts_of, value)) if isinstance(value, list) else 1


def size(document: bytes, cuts: list[int]) -> int:
    """The smallest limit that the document is within, fed in parts."""
    edges = [0, *sorted(cut % (len(document) + 1) for cut in cuts), len(document)]

    def within(limit: int) -> bool:
        counter = JsonSize(limit)
        return all(counter.feed(document[a:b]) for a, b in pairwise(edges))

    return next(limit for limit in range(len(document) + 1) if within(limit))


@given(VALUES, st.lists(st.integers(0, 500), max_size=6), st.booleans())
def test_a_document_is_as_large_as_its_values_however_it_arrives(value, cuts, escaped):
    document = json.dumps(value, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
    assert size(document, cuts) == size(document, [])
    assert parts_of(value) - 1 <= size(document, cuts) <= 2 * parts_of(value)


@pytest.mark.parametrize("hostile", [b"[" * 99999, b'""' * 99999, b"[1" + b",1" * 99999, b'{"a":1,' * 99999])
def test_what_is_too_large_is_noticed_wherever_it_is_cut(hostile):
    for length in (1, 7, len(hostile)):
        counter = JsonSize(1000)
        seen = [counter.feed(hostile[at : at + length]) for at in range(0, 60_000, length)]
        assert not seen[-1]


@pytest.mark.parametrize("long", [b'"' + b"\\\\" * 99999 + b'"', b'"' + b",[{" * 99999 + b'"', b'"' + b'\\"' * 99999])
def test_a_long_string_is_one_value(long):
    assert JsonSize(1).feed(long)
    counter = JsonSize(1)
    assert all(counter.feed(long[at : at + 1]) for at in range(len(long)))


def service(**limits) -> FastAPI:
    app = FastAPI()
    app.state.going = asyncio.Event()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/v1/echo")
    async def echo(body: dict) -> int:
        return len(body)

    @app.post("/v1/wait")
    async def wait(body: dict) -> None:
        await app.state.going.wait()

    return guard(app, Limits(**limits), Keys())


async def request(app, path: str, parts: list[bytes], method: str = "POST") -> int | None:
    """The status of a request whose body never ends if its last part is None; None if it gets no response."""
    arriving, statuses = iter(parts), []

    async def receive() -> dict:
        part = next(arriving, b"")
        if part is None:
            await asyncio.Event().wait()
        if part == b"gone":
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": part != b""}

    async def send(message: dict) -> None:
        statuses.append(message.get("status"))

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": "", "scheme": "http",
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "server": ("a", 1),
        "client": ("b", 2),
    }  # fmt: skip
    await app(scope, receive, send)
    return statuses[0] if statuses else None


def test_bodies_that_do_not_come_block_nobody():
    async def run() -> list[int | None]:
        app = service(body_timeout_s=0.5, max_requests=2)
        slow = [asyncio.create_task(request(app, "/v1/echo", [b"{", None])) for _ in range(600)]
        await asyncio.sleep(0.1)
        assert await request(app, "/v1/echo", [b"{}"]) == 200
        assert await request(app, "/health", [], "GET") == 200
        return await asyncio.gather(*slow)

    assert set(asyncio.run(run())) == {408}


def test_over_the_requests_or_bytes_that_are_held_it_is_overloaded_but_healthy():
    async def run() -> None:
        app = service(max_requests=2, max_held_bytes=100, body_timeout_s=5)
        at_work = [asyncio.create_task(request(app, "/v1/wait", [b"{}"])) for _ in range(2)]
        await asyncio.sleep(0.1)
        assert await request(app, "/v1/echo", [b"{}"]) == 503
        assert await request(app, "/health", [], "GET") == 200
        app.state.going.set()
        assert await asyncio.gather(*at_work) == [200, 200]
        holding = asyncio.create_task(request(app, "/v1/echo", [b" " * 90, None]))
        await asyncio.sleep(0.1)
        assert await request(app, "/v1/echo", [b'{"a": 12345}']) == 503
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        assert await request(app, "/v1/echo", [b'{"a": 12345}']) == 200  # and what it held is free again

    asyncio.run(run())


def test_a_client_that_leaves_before_its_body_is_complete_gets_no_response():
    assert asyncio.run(request(service(), "/v1/echo", [b"{", b"gone"])) is None


def test_many_values_are_refused_before_they_are_parsed(monkeypatch):
    app = service(max_body_values=1000)
    monkeypatch.setattr(json, "loads", None)
    assert asyncio.run(request(app, "/v1/echo", [b'{"input":[' + b"1," * 1000 + b"1]}"])) == 413
