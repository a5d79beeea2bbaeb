"""API keys, rate limit, body limit, request ids and the access log, through plain ASGI calls."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import pickle
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
from fastapi import Body, FastAPI, Request
from fastapi.responses import StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from umarvel_ray.errors import UserError
from umarvel_ray.serving import auth
from umarvel_ray.serving.auth import Keys, RateLimit
from umarvel_ray.serving.middleware import AccessLog, guard
from umarvel_ray.serving.settings import Limits

KEY, OTHER = "k" * 20, "0123456789abcdef"
SECRET = "do-not-log-me"


def keys(*entries: str) -> Keys:
    return Keys.load(environment={auth.VARIABLE: ",".join(entries)})


def test_keys_from_file_and_environment(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(f"# for the team\nann:{KEY}  # since May\n\n{'x' * 16}\n")
    path.chmod(0o600)
    loaded = Keys.load(path, {auth.VARIABLE: f"bob:{OTHER}, {'y' * 16}"})
    assert not caplog.records
    assert len(loaded) == 4
    names = [loaded.holder_of(f"Bearer {key}").name for key in (KEY, OTHER, "x" * 16, "y" * 16)]
    assert names == ["ann", "bob", *(hashlib.sha256(c * 16).hexdigest()[:8] for c in (b"x", b"y"))]
    assert loaded.holder_of(f"bearer {KEY}") == ("ann", True)
    for wrong in (None, "", KEY, f"Basic {KEY}", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer é"):
        assert loaded.holder_of(wrong) is None
    copy = pickle.loads(pickle.dumps(loaded))
    assert copy.holder_of(f"Bearer {KEY}").name == "ann"
    assert KEY not in repr(loaded)
    assert KEY.encode() not in pickle.dumps(loaded)
    path.chmod(0o640)
    Keys.load(path, {})
    assert "readable by others" in caplog.text
    assert KEY not in caplog.text


def test_without_keys_the_service_is_open():
    assert not keys().are_needed
    assert not Keys.load(environment={}).are_needed


def test_hashes_stand_for_keys():
    stored = auth.hashed(f"ann:{KEY}, bob:{OTHER} read")
    assert KEY not in stored
    assert OTHER not in stored
    assert keys(stored).holders == keys(f"ann:{KEY}", f"bob:{OTHER} read").holders
    assert keys(stored).holder_of(f"Bearer {OTHER}") == ("bob", False)
    assert auth.hashed(stored) == stored


def test_a_key_that_only_reads_does_not_change_the_index():
    app = service(allowed=keys(f"ann:{KEY} read", f"bob:{OTHER} write"))
    ann, bob = ({"authorization": f"Bearer {key}"} for key in (KEY, OTHER))
    for path in ("/v1/index", "/v1/index/", "/v1/index/delete"):
        response = call(app, "POST", path, **ann)
        assert (response.status, response.error["type"]) == (403, "permission_error")
        assert call(app, "POST", path, **bob).status == 404  # this app has no index
    assert call(app, "POST", "/v1/raw", [b"abc"], **ann).body == b"3"
    assert call(app, "GET", "/v1/index", **ann).status == 404


def test_an_edited_file_of_keys_counts_without_a_restart(tmp_path, caplog):
    path = tmp_path / "keys"
    path.write_text(f"ann:{KEY}\n")
    path.chmod(0o600)
    current = auth.CurrentKeys(Keys.load(path, {auth.VARIABLE: "eve:" + "e" * 16}))

    def names(now: float) -> list[str | None]:
        found = [current.at(now).holder_of(f"Bearer {key}") for key in (KEY, OTHER, "e" * 16)]
        return [holder and holder.name for holder in found]

    assert names(0.0) == ["ann", None, "eve"]
    path.write_text(f"bob:{OTHER} read\n")
    assert names(0.5) == ["ann", None, "eve"]  # it is looked at once a second
    assert names(1.1) == [None, "bob", "eve"]
    path.write_text(f"bob:{OTHER[:3]}\n")
    assert names(2.2) == [None, "bob", "eve"]
    assert "keys stay as they were" in caplog.text
    path.write_text("")
    assert names(3.3) == [None, None, "eve"]
    assert current.at(3.3).are_needed
    path.unlink()
    assert names(4.4) == [None, None, "eve"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("# nothing\n", "no API key"),
        (f"ann:{KEY[:15]}", "line 1: the API key is shorter than 16"),
        (f"\nann {KEY}", "line 2: not an API key"),
        (f"ann:{KEY} admin", "line 1: not an API key"),
        (f"ann:{KEY}é", "not an API key"),
        (f"ann:{KEY}\nbob:{KEY}", "line 2: .* twice"),
        (f"ann:{KEY}\nann:{OTHER}", "line 2: .* twice"),
    ],
)
def test_bad_keys_are_one_line_without_the_key(tmp_path, text, message):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        Keys.load(path, {})
    assert "\n" not in str(error.value)
    assert KEY[:15] not in str(error.value)


def test_every_hash_is_compared_for_every_key(monkeypatch):
    several = keys(*(f"{letter}:{letter * 16}" for letter in "abcde"))
    compared = []
    spy = SimpleNamespace(compare_digest=lambda one, two: compared.append(one) or one == two)
    monkeypatch.setattr(auth, "hmac", spy)
    for key, name in (("a" * 16, "a"), ("e" * 16, "e"), ("f" * 16, None)):
        compared.clear()
        holder = several.holder_of(f"Bearer {key}")
        assert (holder and holder.name) == name
        assert compared == [hashlib.sha256(letter * 16).digest() for letter in (b"a", b"b", b"c", b"d", b"e")]


@given(st.sampled_from([0.5, 1, 7, 60, 600]), st.lists(st.floats(0, 30), min_size=1, max_size=60))
def test_no_window_exceeds_the_bucket_and_the_wait_suffices(per_minute, gaps):
    limit, now, passed = RateLimit(per_minute), 0.0, []
    for gap in gaps:
        now += gap
        if wait := limit.allow("ann", now):
            assert limit.allow("ann", now + 0.99 * wait)
            now += 1.001 * wait
            assert limit.allow("ann", now) == 0
        assert limit.allow("bob", now) >= 0  # another bucket
        passed.append(now)
    for first, start in enumerate(passed):
        for last, end in enumerate(passed[first:], first):
            assert last - first + 1 <= max(per_minute, 1) + (end - start) * per_minute / 60 + 1e-6


def test_a_minute_of_requests_may_arrive_at_once():
    limit = RateLimit(5)
    assert [limit.allow("ann", 0.0) > 0 for _ in range(6)] == [False] * 5 + [True]
    assert limit.allow("bob", 0.0) == 0


def test_unknown_limits_are_rejected():
    with pytest.raises(ValidationError, match="max_itmes"):
        Limits(max_itmes=3)
    assert pickle.loads(pickle.dumps(Limits(max_items=3))).max_items == 3


def service(limits: Limits | None = None, allowed: Keys | None = None) -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/v1/items/{name}")
    async def items(name: str, body: dict = Body()) -> int:  # noqa: B008
        return len(body)

    @app.post("/v1/raw")
    async def raw(request: Request) -> int:
        return sum([len(chunk) async for chunk in request.stream()])

    @app.post("/v1/boom")
    async def boom(body: dict = Body()) -> None:  # noqa: B008
        raise KeyError(body["text"])

    @app.get("/v1/halfway")
    async def halfway() -> StreamingResponse:
        def parts() -> Iterable[str]:
            yield "some"
            raise KeyError(SECRET)

        return StreamingResponse(parts())

    return guard(app, limits or Limits(), allowed or Keys())


class Response:
    def __init__(self, messages: list[dict], received: int) -> None:
        self.status = messages[0]["status"]
        self.headers = [(name.decode(), value.decode()) for name, value in messages[0]["headers"]]
        self.body = b"".join(message.get("body", b"") for message in messages)
        self.received = received

    @property
    def error(self) -> dict:
        return json.loads(self.body)["error"]

    def __getitem__(self, name: str) -> str:
        return dict(self.headers)[name]


def call(app, method: str, path: str, chunks: Iterable[bytes] = (b"",), query: str = "", **headers: str) -> Response:
    """Send one request to an ASGI app; the body arrives in `chunks`."""
    chunks = list(chunks)
    incoming = [
        {"type": "http.request", "body": chunk, "more_body": n < len(chunks)} for n, chunk in enumerate(chunks, 1)
    ]
    received, sent = 0, []

    async def receive() -> dict:
        nonlocal received
        received += 1
        if received > len(incoming):
            await asyncio.Event().wait()  # the client stays connected
        return incoming[received - 1]

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": query.encode(),
        "headers": [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    asyncio.run(app(scope, receive, send))
    return Response(sent, received)


@pytest.fixture
def lines():
    """What the access log writes, parsed."""
    written: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(record.getMessage())

    handler = Lines()
    logging.getLogger("umarvel.access").addHandler(handler)
    yield lambda: [json.loads(line) for line in written]
    logging.getLogger("umarvel.access").removeHandler(handler)


def test_a_key_opens_the_protected_paths():
    app = service(allowed=keys(f"ann:{KEY}"))
    for wrong in ({}, {"authorization": f"Bearer {OTHER}"}, {"authorization": f"Basic {KEY}"}):
        response = call(app, "POST", "/v1/raw", **wrong)
        assert response.status == 401
        assert response["www-authenticate"] == "Bearer"
        assert response.error["type"] == "authentication_error"
    assert call(app, "POST", "/v1/raw", [b"abc"], authorization=f"Bearer {KEY}").body == b"3"
    assert call(app, "GET", "/health").status == 200
    assert [call(app, "GET", path).status for path in ("/", "/static/page.js")] == [
        404,
        404,
    ]  # open, but this app has no such routes
    closed = ("/docs", "/openapi.json", "/health/", "//", "/staticx", "/v1/../health", "/nowhere")
    assert {call(app, "GET", path).status for path in closed} == {401}
    assert call(service(), "POST", "/v1/raw", [b"abc"]).body == b"3"


def test_each_key_has_its_own_rate_limit():
    app = service(Limits(requests_per_minute=2), keys(f"ann:{KEY}", f"bob:{OTHER}"))
    ann, bob = ({"authorization": f"Bearer {key}"} for key in (KEY, OTHER))
    assert [call(app, "POST", "/v1/raw", **ann).status for _ in range(3)] == [200, 200, 429]
    response = call(app, "POST", "/v1/raw", **ann)
    assert 1 <= int(response["retry-after"]) <= 30
    assert response.error["type"] == "rate_limit_error"
    assert call(app, "POST", "/v1/raw", **bob).status == 200
    assert call(app, "GET", "/health").status == 200


@pytest.mark.parametrize("path", ["/v1/raw", "/v1/items/a"])
def test_a_body_over_the_limit_is_413_and_no_longer_read(path):
    app = service(Limits(max_body_bytes=100))
    body = json.dumps({"a": "x" * 92}).encode()
    assert len(body) == 101
    assert call(app, "POST", path, [body[:-2], b"}"], content_type="application/json").status != 413
    for length in ("101", "9" * 5000):
        declared = call(app, "POST", path, [body], content_length=length)
        assert (declared.status, declared.received) == (413, 0)
        assert declared.error["param"] == "body"
    for wrong in ({}, {"content_length": "7"}, {"content_length": "-1"}):
        streamed = call(app, "POST", path, [b"x" * 60] * 9, content_type="application/json", **wrong)
        assert (streamed.status, streamed.received) == (413, 2)
        assert streamed.error["message"] == "body: over 100 bytes"


def test_a_safe_request_id_is_kept_and_any_other_replaced(lines):
    app = service()
    kept = call(app, "GET", "/health", x_request_id="a1/b-2")
    assert [name for name, _ in kept.headers].count("x-request-id") == 0  # Serve's proxy adds it
    replaced = [
        call(app, "GET", "/health", **headers) for headers in ({}, {"x_request_id": "a b"}, {"x_request_id": "a" * 129})
    ]
    ids = [response["x-request-id"] for response in replaced]
    assert len(set(ids)) == 3
    assert [line["request_id"] for line in lines()] == ["a1/b-2", *ids]


def test_an_unexpected_exception_is_one_response_and_one_traceback(lines):
    response = call(
        service(), "POST", "/v1/boom", [json.dumps({"text": SECRET}).encode()], content_type="application/json"
    )
    assert response.status == 500
    error, request = lines()
    assert (error["event"], error["error"], request["status"]) == ("error", "KeyError", 500)
    assert any(frame.endswith(" boom") for frame in error["traceback"])
    assert response["x-request-id"] == error["request_id"] == request["request_id"]
    assert error["request_id"] in response.error["message"]
    assert SECRET not in json.dumps(lines()) + response.body.decode()


def test_an_interrupted_response_is_logged_and_ends_the_connection(lines):
    with pytest.raises(RuntimeError, match="after its response began") as error:
        call(service(), "GET", "/v1/halfway")
    assert SECRET not in str(error.value)
    assert error.value.__suppress_context__
    assert [line["event"] for line in lines()] == ["error", "request"]


def test_one_line_per_request_with_nothing_a_client_wrote(lines, capfd):
    app = service(Limits(max_body_bytes=1000), keys(f"ann:{KEY}"))
    body = json.dumps({"text": SECRET}).encode()
    for path in (f"/v1/items/{SECRET}", f"/{SECRET}", "/v1/boom"):
        for key in (KEY, SECRET * 2):
            headers = {"authorization": f"Bearer {key}", "content_type": "application/json", "cookie": SECRET}
            call(app, "POST", path, [body], query=f"q={SECRET}", x_request_id=f"{SECRET}?", **headers)
    written = [line for line in lines() if line["event"] == "request"]
    assert [line["status"] for line in written] == [200, 401, 404, 401, 500, 401]
    assert [line["key"] for line in written] == ["ann", None] * 3
    assert [line["route"] for line in written] == ["/v1/items/{name}", None, None, None, "/v1/boom", None]
    assert written[0].keys() == {"time", "request_id", "event", "method", "route", "status", "ms", "key", "body_bytes"}
    assert written[0]["body_bytes"] == len(body)
    out, err = capfd.readouterr()
    assert SECRET not in json.dumps(lines()) + out + err
    assert KEY not in json.dumps(lines()) + out + err


def test_a_client_that_disconnects_is_logged_without_a_status(lines):
    async def disconnected(scope, receive, send) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(AccessLog(disconnected)({"type": "http", "method": "GET", "path": "/", "headers": []}, None, None))
    assert [line["status"] for line in lines()] == [None]
