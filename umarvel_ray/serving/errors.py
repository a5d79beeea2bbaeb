"""What can go wrong, as HTTP says it: OpenAI's error object, plus the place of the offending item."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

RETRY_AFTER_S = 1


class BadItem(Exception):
    """An item that cannot be used; `param` is its place in the body, as `input[3].image`."""

    def __init__(self, message: str, param: str, index: int | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.index = message, param, index


class Busy(Exception):
    """A deployment's queue is full, or it has no replica that can answer just now."""


class NotSeen(Exception):
    """The index has not come to the commit that an answer must have seen."""

    def __init__(self, after: int, sequence: int) -> None:
        super().__init__(after, sequence)
        self.after, self.sequence = after, sequence


class NotServed(Exception):
    """A model or a part that this service does not have."""


class Refusal(BaseModel):
    """OpenAI's error; `index` is the offending item's place in its list, `param` the place in the body."""

    message: str
    type: str
    param: str | None
    index: int | None
    code: None


class RefusalBody(BaseModel):
    error: Refusal


REFUSALS = {
    400: {"model": RefusalBody, "description": "an item or a body that cannot be used"},
    401: {"model": RefusalBody, "description": "no valid API key"},
    404: {"model": RefusalBody, "description": "a model or part that is not served"},
    409: {"model": RefusalBody, "description": "a commit that the index has not come to"},
    413: {"model": RefusalBody, "description": "the body is too large"},
    429: {"model": RefusalBody, "description": "too many requests with this key; see Retry-After"},
    503: {"model": RefusalBody, "description": "the service is at its limit; see Retry-After"},
}


def error_body(message: str, kind: str, param: str | None = None, index: int | None = None) -> dict[str, Any]:
    """A `RefusalBody`."""
    return {"error": {"message": message, "type": kind, "param": param, "index": index, "code": None}}


def add_handlers(app: FastAPI) -> None:
    """Every error leaves `app` in one shape."""

    @app.exception_handler(BadItem)
    async def _bad_item(request: Request, error: BadItem) -> JSONResponse:
        return JSONResponse(error_body(error.message, "invalid_request_error", error.param, error.index), 400)

    @app.exception_handler(RequestValidationError)
    async def _bad_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(validation_error(error.errors()), 400)

    @app.exception_handler(Busy)
    async def _busy(request: Request, error: Busy) -> JSONResponse:
        body = error_body("the service is at its limit; try again shortly", "overloaded")
        return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(NotSeen)
    async def _not_seen(request: Request, error: NotSeen) -> JSONResponse:
        message = f"after: the index is at commit {error.sequence} and has not seen {error.after}"
        return JSONResponse(error_body(message, "conflict_error", "after"), 409)

    @app.exception_handler(NotServed)
    async def _not_served(request: Request, error: NotServed) -> JSONResponse:
        return JSONResponse(error_body(str(error), "not_found_error"), 404)

    @app.exception_handler(HTTPException)  # no such route, or not with this method
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        return JSONResponse(error_body(error.detail, kind), error.status_code, error.headers)


def validation_error(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line from pydantic's list of complaints, whose places start with "body"."""
    if errors[0]["type"] == "json_invalid":  # its place is a character's, not an item's
        return error_body("body: not valid JSON", "invalid_request_error", "body")
    keys = [part for part in errors[0]["loc"][1:] if isinstance(part, int) or " " not in part]
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".") or "body"
    index = next((key for key in keys if isinstance(key, int)), None)
    return error_body(f"{param}: {errors[0]['msg']}", "invalid_request_error", param, index)
