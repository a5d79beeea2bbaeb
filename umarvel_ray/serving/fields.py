"""Request bodies as models: null is the same as a missing field, and unknown fields are ignored but named in a header.

So the clients of OpenAI, Cohere, Jina and vLLM can send what their own services know. `Limits.unknown_fields` makes
unknown fields errors instead.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

HEADER = "x-ignored-fields"
_SHOWN = 20  # names in the header
_SAFE = re.compile(r"[\w.-]{1,64}", re.ASCII)


@dataclass
class Unknown:
    """The unknown fields of one request."""

    forbidden: bool = False
    names: dict[str, None] = field(default_factory=dict)

    @property
    def header(self) -> str:
        """Their names; "" for none. A name that is not safe in a header is left out."""
        return ", ".join([name for name in self.names if _SAFE.fullmatch(name)][:_SHOWN])


UNKNOWN: ContextVar[Unknown | None] = ContextVar("unknown", default=None)


class Body(BaseModel):
    """A request body, or a part of one."""

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        unknown = UNKNOWN.get()
        if unknown is not None and cls.model_config["extra"] == "ignore" and (names := given.keys() - _names(cls)):
            if unknown.forbidden:
                raise PydanticCustomError("unknown", "unknown field '{name}'", {"name": min(names)[:64]})
            unknown.names |= dict.fromkeys(sorted(names)[:_SHOWN])
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        made = handler(schema)
        properties = handler.resolve_ref_schema(made).get("properties", {})
        for name in properties.keys() - set(handler.resolve_ref_schema(made).get("required", [])):
            own = properties[name]
            if {"type": "null"} not in own.get("anyOf", []):
                shown = {key: own.pop(key) for key in ("title", "description", "default", "examples") if key in own}
                properties[name] = {"anyOf": [own, {"type": "null"}], **shown}
        return made


@cache
def _names(model: type[BaseModel]) -> frozenset[str]:
    """What a body may call the fields of a model."""
    names: set[str] = set()
    for name, info in model.model_fields.items():
        alias = info.validation_alias
        names |= {name} | ({str(one) for one in alias.choices} if isinstance(alias, AliasChoices) else set())
    return frozenset(names)
