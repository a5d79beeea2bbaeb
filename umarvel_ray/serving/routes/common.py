"""What several routes share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import Depends, Request
from pydantic import BaseModel, Field, StringConstraints

from umarvel_ray.serving.backend import Backend, Made, good
from umarvel_ray.serving.errors import BadItem, NotServed
from umarvel_ray.serving.remote_model import RemoteModel


async def _backend(request: Request) -> Backend:  # FastAPI runs what is not async in a thread
    return request.app.state.backend


Served = Annotated[Backend, Depends(_backend)]
OnError = Annotated[
    Literal["fail", "skip"],
    Field(description="a bad item fails the request, or is left out and told of in `errors`"),
]
Name = Annotated[str, StringConstraints(max_length=256)]  # constrained strings hold no half surrogate pairs
InputType = Literal["query", "document"]


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class ItemError(BaseModel):
    index: int | None
    param: str
    message: str


def check_model(asked: str | None, model: RemoteModel) -> None:
    """Raises: NotServed."""
    if asked not in (None, model.name):
        raise NotServed(f"no model '{asked}' on this route; it serves '{model.name}'")


def sorted_out(items: Sequence[Made | BadItem], on_error: str) -> tuple[list[tuple[int, Made]], list[ItemError]]:
    """The good items with their numbers, and the bad ones.

    Raises:
        BadItem: the first bad one, unless they are to be skipped.
    """
    if on_error == "fail":
        good(items)
    bad = [one for one in items if isinstance(one, BadItem)]
    kept = [(number, one) for number, one in enumerate(items) if not isinstance(one, BadItem)]
    return kept, [ItemError(index=one.index, param=one.param, message=one.message) for one in bad]
