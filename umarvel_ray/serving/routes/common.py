"""Types and helpers shared by several routes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from fastapi import Depends, Request
from pydantic import BaseModel, Field, StringConstraints

from umarvel_ray.serving.backend import Backend, T, require_good
from umarvel_ray.serving.errors import BadItem, NotServed
from umarvel_ray.serving.remote_model import RemoteModel


async def _backend(request: Request) -> Backend:  # async, because FastAPI would run a plain function in a thread
    return request.app.state.backend


Served = Annotated[Backend, Depends(_backend)]
OnError = Annotated[
    Literal["fail", "skip"],
    Field(description="a bad item fails the request, or is left out and listed in `errors`"),
]
Name = Annotated[str, StringConstraints(max_length=256)]  # constrained strings contain no unpaired surrogates
InputType = Literal["query", "document"]


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


def usage_of(tokens: Iterable[int]) -> Usage:
    """What a request used, given the tokens of its items."""
    total = sum(tokens)
    return Usage(prompt_tokens=total, total_tokens=total)


class ItemError(BaseModel):
    index: int | None
    param: str
    message: str


def check_model(requested: str | None, model: RemoteModel[Any]) -> None:
    """Raises: NotServed."""
    if requested not in (None, model.name):
        raise NotServed(f"no model '{requested}' on this route; it serves '{model.name}'")


def split_bad(items: Sequence[T | BadItem], on_error: str) -> tuple[list[tuple[int, T]], list[ItemError]]:
    """The good items with their positions, and the bad ones.

    Raises:
        BadItem: the first bad one, if `on_error` is "fail".
    """
    if on_error == "fail":
        require_good(items)
    bad = [one for one in items if isinstance(one, BadItem)]
    kept = [(number, one) for number, one in enumerate(items) if not isinstance(one, BadItem)]
    return kept, [ItemError(index=one.index, param=one.param, message=one.message) for one in bad]
