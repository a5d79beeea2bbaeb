"""Middleware in front of the routes: request ids, the access log, API keys, rate and body limits.

Plain ASGI, so that bodies stream through. `guard(app, limits, keys)` installs all of it. Errors have OpenAI's shape.
Nothing that a client wrote (body, query string, key, a path without a route) is ever logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import time
import traceback
import uuid
from datetime import UTC, datetime
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umarvel_ray.serving.auth import ANONYMOUS, Keys, RateLimit
from umarvel_ray.serving.errors import error_body
from umarvel_ray.serving.settings import Limits

OPEN_PATHS = ("/", "/health", "/favicon.ico")  # probes, and the page, which has no secrets and asks for a key itself
OPEN_FOLDER = "/static/"
REQUEST_ID = "x-request-id"
_SAFE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)

App = TypeVar("App", bound=Starlette)

logger = logging.getLogger("umarvel.access")
_STDERR = logging.StreamHandler()


def guard(app: App, limits: Limits, keys: Keys) -> App:
    """Install all of this module's middleware; must run in the process that serves `app`."""
    # Starlette makes the middleware added last the outermost.
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    app.add_middleware(Admission, keys=keys, per_minute=limits.requests_per_minute)
    app.add_middleware(AccessLog)
    logger.addHandler(_STDERR)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return app


class AccessLog:
    """Logs one JSON line per request, responds to unexpected exceptions, and handles request ids.

    Serve's proxy generates an `x-request-id` for requests that lack one and adds the id to every response. An id that
    is not safe to log (or missing, without that proxy) is replaced by a new one, which the response then carries.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client_id = Headers(scope=scope).get(REQUEST_ID, "")
        safe = _SAFE_ID.fullmatch(client_id) is not None
        request_id = client_id if safe else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        status, started = None, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not safe:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            _log(request_id, event="error", **_location(error))
            if status is not None:  # `from None`: Serve logs what it gets, and a message may quote the payload
                raise RuntimeError(f"request {request_id} failed after its response began") from None
            message = f"internal error; report request {request_id} to the operator"
            await _refusal(500, message, "server_error")(scope, receive, send_with_id)
        finally:
            _log(
                request_id,
                event="request",
                method=scope["method"],
                route=getattr(scope.get("route"), "path", None),
                status=status,  # null: the client disconnected before the response
                ms=round(1000 * (time.perf_counter() - started), 1),
                key=state.get("key_name"),
                body_bytes=state.get("body_bytes", 0),
            )


class Admission:
    """Responds with 401 if the service has keys and the request has none of them, and with 429 over the rate limit."""

    def __init__(self, app: ASGIApp, keys: Keys, per_minute: float | None = None) -> None:
        self._app, self._keys = app, keys
        self._rate = RateLimit(per_minute) if per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_open(scope):
            name = self._keys.name_of(Headers(scope=scope).get("authorization")) if self._keys else ANONYMOUS
            scope.setdefault("state", {})["key_name"] = name
            if name is None:
                refusal = _refusal(401, "no valid API key; send `Authorization: Bearer KEY`", "authentication_error")
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
            if self._rate and (wait := self._rate.allow(name, time.monotonic())):
                refusal = _refusal(429, "too many requests with this key; try again later", "rate_limit_error")
                refusal.headers["Retry-After"] = str(math.ceil(wait))
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Responds with 413 to a body over `max_bytes`: at once if Content-Length says so, else once that much arrived."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = _refusal(413, f"body: over {self._max_bytes} bytes", "invalid_request_error", "body")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and float(declared) > self._max_bytes:
            await refusal(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["body_bytes"], started = 0, False

        async def counted() -> Message:
            message = await receive()
            state["body_bytes"] += len(message.get("body", b""))
            if state["body_bytes"] > self._max_bytes:
                raise _TooLarge
            return message

        async def send_unless_too_large(message: Message) -> None:
            # Frameworks catch what reading a body raises and send an error of their own; the refusal replaces it.
            nonlocal started
            if started or state["body_bytes"] <= self._max_bytes:
                started = True
                await send(message)

        with contextlib.suppress(_TooLarge):
            await self._app(scope, counted, send_unless_too_large)
        if state["body_bytes"] > self._max_bytes and not started:
            await refusal(scope, receive, send)


class _TooLarge(Exception):
    pass


def _is_open(scope: Scope) -> bool:
    path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _refusal(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(error_body(message, kind, param), status)


def _location(error: BaseException) -> dict[str, Any]:
    """An exception's type and frames, without its message, which may quote the payload."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "traceback": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def _log(request_id: str, **fields: Any) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    logger.info(json.dumps({"time": now, "request_id": request_id, **fields}))
