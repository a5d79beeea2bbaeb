"""Middleware in front of the routes: request ids, the access log, API keys, the rate limit, and bodies (bodies.py).

`guard(app, limits, keys)` installs all of it. Errors have OpenAI's shape.
Nothing that a client wrote (body, query string, key, a path without a route) is ever logged.
"""

from __future__ import annotations

import math
import re
import time
import uuid
from typing import TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from umarvel_ray.serving.access_log import location, log, start_log
from umarvel_ray.serving.auth import ANONYMOUS, CurrentKeys, Keys, RateLimit, changes_the_index, is_open
from umarvel_ray.serving.bodies import Bodies
from umarvel_ray.serving.errors import refusal
from umarvel_ray.serving.fields import HEADER, UNKNOWN, Unknown
from umarvel_ray.serving.settings import Limits

REQUEST_ID = "x-request-id"
_SAFE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)

App = TypeVar("App", bound=Starlette)


def guard(app: App, limits: Limits, keys: Keys) -> App:
    """Install all of this module's middleware; must run in the process that serves `app`."""
    # Starlette makes the middleware added last the outermost.
    app.add_middleware(Bodies, limits=limits)
    app.add_middleware(Admission, keys=keys, per_minute=limits.requests_per_minute)
    app.add_middleware(AccessLog, unknown_fields=limits.unknown_fields)
    start_log()
    return app


class AccessLog:
    """Logs one JSON line per request, responds to unexpected exceptions, and handles request ids.

    Serve's proxy generates an `x-request-id` for requests that lack one and adds the id to every response. An id that
    is not safe to log (or missing, without that proxy) is replaced by a new one, which the response then carries.
    """

    def __init__(self, app: ASGIApp, unknown_fields: str = "ignore") -> None:
        self._app, self._forbidden = app, unknown_fields == "forbid"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unknown = Unknown(self._forbidden)
        UNKNOWN.set(unknown)
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
                if unknown.header:
                    MutableHeaders(scope=message)[HEADER] = unknown.header
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            log(request_id, event="error", **location(error))
            if status is not None:  # `from None`: Serve logs what it gets, and a message may quote the payload
                raise RuntimeError(f"request {request_id} failed after its response began") from None
            message = f"internal error; report request {request_id} to the operator"
            await refusal(500, message, "server_error")(scope, receive, send_with_id)
        finally:
            log(
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
    """Responds with 401 if the service has keys and the request has none of them, and with 429 over the rate limit.

    A key that may only read gets 403 where the index would change.
    """

    def __init__(self, app: ASGIApp, keys: Keys, per_minute: float | None = None) -> None:
        self._app, self._keys = app, CurrentKeys(keys)
        self._rate = RateLimit(per_minute) if per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope):
            keys = self._keys.at(time.monotonic())
            holder = keys.holder_of(Headers(scope=scope).get("authorization")) if keys.are_needed else ANONYMOUS
            scope.setdefault("state", {})["key_name"] = holder and holder.name
            if holder is None:
                response = refusal(401, "no valid API key; send `Authorization: Bearer KEY`", "authentication_error")
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
            if not holder.writes and changes_the_index(scope):
                refused = refusal(403, "this API key may not change the index", "permission_error")
                await refused(scope, receive, send)
                return
            if self._rate and (wait := self._rate.allow(holder.name, time.monotonic())):
                response = refusal(429, "too many requests with this key; try again later", "rate_limit_error")
                response.headers["Retry-After"] = str(math.ceil(wait))
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
