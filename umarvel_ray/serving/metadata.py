"""Metadata of documents as clients send it: names, and strings or whole numbers to filter by."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, StrictInt, StringConstraints, Tag

from umarvel_ray.index.labels import LABELS, NOT_LABELS


def _check_name(name: str) -> str:
    if name in (*LABELS, *NOT_LABELS):
        raise ValueError(f"metadata cannot be called '{name}'")
    return name


def _tag(value: Any) -> str | None:
    return {str: "a string", int: "a whole number"}.get(type(value))


MetadataName = Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(_check_name)]
MetadataValue = Annotated[
    Annotated[str, StringConstraints(max_length=512), Tag("a string")]
    | Annotated[StrictInt, Field(ge=-(2**63), lt=2**63), Tag("a whole number")],
    Discriminator(_tag, custom_error_type="metadata", custom_error_message="give a string or a whole number"),
]
