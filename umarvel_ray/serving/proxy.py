"""Middleware that runs in Serve's HTTP proxy before Serve's own code.

RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names `middlewares`.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send


class ReadableHeaders:
    """Drops headers that are not UTF-8: Serve decodes some of them and would respond with 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            scope["headers"] = [pair for pair in scope["headers"] if _is_text(pair[1])]
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve's proxy installs."""
    return [Middleware(ReadableHeaders)]


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
