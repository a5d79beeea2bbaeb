"""The service's errors and their HTTP responses: OpenAI's error object, plus the position of the offending item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from umarvel_ray.index.log import NoSpace
from umarvel_ray.index.store import Unreachable, Unstorable

RETRY_AFTER_S = 1


class BadItem(Exception):
    """An item that cannot be used; `param` is its place in the request body, such as `input[3].image`."""

    def __init__(self, message: str, param: str, index: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.index = message, param, index


class Busy(Exception):
    """A deployment's queue is full, or none of its replicas can respond right now."""


class NotSeen(Exception):
    """The index has not reached the commit that a search asked for with `after`."""

    def __init__(self, after: int, sequence: int) -> None:
        super().__init__(after, sequence)
        self.after, self.sequence = after, sequence


class NotServed(Exception):
    """A model or component that this service does not have."""


class ErrorObject(BaseModel):
    """OpenAI's error; `param` is the place in the request body, `index` the offending item's position in its list."""

    message: str
    type: str
    param: str | None
    index: int | None
    code: None


class ErrorResponse(BaseModel):
    error: ErrorObject
    detail: str = Field(description="the message again, where Jina's and FastAPI's clients look for it")


ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "an invalid item or request body"},
    401: {"model": ErrorResponse, "description": "no valid API key"},
    403: {"model": ErrorResponse, "description": "the API key may not change the index"},
    404: {"model": ErrorResponse, "description": "a model or component that is not served"},
    409: {"model": ErrorResponse, "description": "a commit that the index has not reached"},
    408: {"model": ErrorResponse, "description": "the request body did not arrive in time"},
    413: {"model": ErrorResponse, "description": "the request body is too large"},
    429: {"model": ErrorResponse, "description": "too many requests with this key; see Retry-After"},
    507: {"model": ErrorResponse, "description": "the index's disk is full"},
    503: {"model": ErrorResponse, "description": "the service is overloaded; see Retry-After"},
}


def error_body(message: str, kind: str, param: str | None = None, index: int | None = None) -> dict[str, Any]:
    """An `ErrorResponse` as JSON."""
    error = {"message": message, "type": kind, "param": param, "index": index, "code": None}
    return {"error": error, "detail": message}


def refusal(status: int, message: str, kind: str, param: str | None = None, index: int | None = None) -> JSONResponse:
    """An error as a response; one of 503 says when to try again."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    return JSONResponse(error_body(message, kind, param, index), status, headers)


def add_handlers(app: FastAPI) -> None:
    """Give every error that leaves `app` the same shape."""

    @app.exception_handler(BadItem)
    async def _bad_item(request: Request, error: BadItem) -> JSONResponse:
        return refusal(400, error.message, "invalid_request_error", error.param, error.index)

    @app.exception_handler(RequestValidationError)
    async def _bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(validation_error(error.errors()), 400)

    @app.exception_handler(Busy)
    async def _busy(request: Request, error: Busy) -> JSONResponse:
        return refusal(503, "the service is overloaded; try again shortly", "overloaded")

    @app.exception_handler(NotSeen)
    async def _not_seen(request: Request, error: NotSeen) -> JSONResponse:
        message = f"after: the index is at commit {error.sequence} and has not reached {error.after}"
        return refusal(409, message, "conflict_error", "after")

    @app.exception_handler(NoSpace)
    async def _no_space(request: Request, error: NoSpace) -> JSONResponse:
        return refusal(507, "the index's disk is full; nothing was changed", "insufficient_storage")

    @app.exception_handler(Unreachable)
    async def _unreachable(request: Request, error: Unreachable) -> JSONResponse:
        return refusal(503, "the store of the documents does not respond; try again shortly", "store_unreachable")

    @app.exception_handler(Unstorable)
    async def _unstorable(request: Request, error: Unstorable) -> JSONResponse:
        message = "a document has a character that the store cannot hold (U+0000); remove it; nothing was changed"
        return refusal(400, message, "invalid_request_error")

    @app.exception_handler(NotServed)
    async def _not_served(request: Request, error: NotServed) -> JSONResponse:
        return refusal(404, str(error), "not_found_error")

    @app.exception_handler(HTTPException)  # no such route, or the wrong method
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        return JSONResponse(error_body(error.detail, kind), error.status_code, error.headers)


def validation_error(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first of pydantic's errors, in one line; their locations start with "body"."""
    if errors[0]["type"] == "json_invalid":  # its location is a character offset, not an item
        return error_body("body: not valid JSON", "invalid_request_error", "body")
    # Keys of the body; parts with a space are the tags of a union's branches (items.py).
    keys = [part for part in errors[0]["loc"][1:] if isinstance(part, int) or " " not in part]
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".") or "body"
    index = next((key for key in keys if isinstance(key, int)), None)
    return error_body(f"{param}: {errors[0]['msg']}", "invalid_request_error", param, index)
