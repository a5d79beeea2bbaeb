"""Request bodies are read whole before anything is done with them, within limits on size, values and time.

A slow client therefore occupies nothing but a little memory. Counting a body's JSON values before it is parsed keeps
a megabyte of `[1,1,1,…` from becoming a gigabyte of Python objects.
"""

from __future__ import annotations

import asyncio
import re
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umarvel_ray.serving.auth import is_open
from umarvel_ray.serving.errors import refusal
from umarvel_ray.serving.settings import Limits

_IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_VALUE = (b",", b"[", b"{")


class JsonSize:
    """Counts strings, commas and opening brackets as bytes arrive, at least one for each value of a JSON document.

    Costs no more than the bytes' length and `limit` steps. Bytes that are not JSON have some size too.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._count = limit, 0
        self._in_string = self._escaped = False

    def feed(self, part: bytes) -> bool:
        """Whether the document is still within the limit."""
        at = 0
        if self._escaped and part:  # the part before ended with a backslash
            at, self._escaped = 1, False
        while at < len(part) and self._count <= self._limit:
            if self._in_string:
                at = _IN_STRING.match(part, at).end()  # type: ignore[union-attr]  # it matches nothing, too
                if part[at : at + 1] == b"\\":
                    self._escaped = True
                    break
                self._in_string = at == len(part)
                at += 1
            else:
                end = part.find(b'"', at)
                self._in_string = end >= 0
                end = end if end >= 0 else len(part)
                self._count += self._in_string + sum(part.count(mark, at, end) for mark in _VALUE)
                at = end + 1
        return self._count <= self._limit


class _Gone(Exception):
    """The client disconnected before its body was complete."""


class _Refused(NamedTuple):
    status: int
    message: str
    kind: str


OVERLOADED = _Refused(503, "the service is overloaded; try again shortly", "overloaded")


class Bodies:
    """Reads each request's body, and passes the request on when it is complete.

    Responds with 413 to a body over `max_body_bytes` or `max_body_values` (at once if Content-Length says so), with 408
    after `body_timeout_s`, and with 503 while the process holds `max_held_bytes` or answers `max_requests`.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._held = self._answering = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        try:
            refused = await self._read(scope, receive, body)
            if refused is None and self._answering >= self._limits.max_requests and not is_open(scope):
                refused = OVERLOADED
            if refused is not None:
                await _refuse(refused, scope, receive, send)
                return
            self._answering += 1
            try:
                await self._app(scope, _once(body, receive), send)
            finally:
                self._answering -= 1
        except _Gone:
            pass
        finally:
            self._held -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> _Refused | None:
        limits, state = self._limits, scope.setdefault("state", {})
        state["body_bytes"] = 0
        too_large = _Refused(413, f"body: over {limits.max_body_bytes} bytes", "invalid_request_error")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and float(declared) > limits.max_body_bytes:
            return too_large
        size, more = JsonSize(limits.max_body_values), True
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part, more = message.get("body", b""), message.get("more_body", False)
                    state["body_bytes"] += len(part)
                    if state["body_bytes"] > limits.max_body_bytes:
                        return too_large
                    if self._held + len(part) > limits.max_held_bytes:
                        return OVERLOADED
                    if not size.feed(part):
                        most = f"over {limits.max_body_values} JSON values; send less at a time"
                        return _Refused(413, f"body: {most}", "invalid_request_error")
                    self._held += len(part)
                    body += part
        except TimeoutError:
            return _Refused(408, f"body: not received within {limits.body_timeout_s:g} s", "invalid_request_error")
        return None


def _once(body: bytearray, receive: Receive) -> Receive:
    """A `receive` that gives the body in one message, then whatever the client does next."""
    left = [bytes(body)]

    async def replayed() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return replayed


async def _refuse(refused: _Refused, scope: Scope, receive: Receive, send: Send) -> None:
    response = refusal(refused.status, refused.message, refused.kind, "body" if refused.status < 500 else None)
    await response(scope, receive, send)
