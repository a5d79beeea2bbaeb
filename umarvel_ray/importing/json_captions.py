"""The captions in a JSON value that belongs to one picture: of a file beside it, or of a member of a tar file."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any

from umarvel_ray.importing.columns import CAPTION, CLEAR
from umarvel_ray.importing.record import BadRow, BadTable
from umarvel_ray.importing.text import column_name


def captions_in(content: bytes | str, key: str | None, names: Collection[str] = ()) -> list[str]:
    """The captions: a text or a list of them, or what stands under a key.

    Args:
        key: under which captions stand, in the user's words; None to find out.
        names: of the picture; a title that repeats one says nothing about it.

    Raises:
        BadRow: not valid JSON, or no caption.
        BadTable: several keys may be the caption's.
    """
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRow("not valid JSON", str(error)) from None
    if not isinstance(value, dict):
        if not (texts := _texts(value)):
            raise BadRow("no caption", f"json holds {type(value).__name__}")
        return texts
    keyed = {column_name(name): _texts(given) for name, given in value.items()}
    keyed = {name: said for name, texts in keyed.items() if (said := [text for text in texts if text not in names])}
    wanted = [column_name(key)] if key else [name for name in CAPTION if name in keyed]
    found = [keyed[name] for name in wanted if name in keyed]
    if not found:
        asked = f"'{key}'" if key else f"any of {', '.join(CAPTION)}"
        raise BadRow("no caption", f"json has no text under {asked}; name its key with --caption")
    if wanted[0] not in CLEAR and any(said != found[0] for said in found):
        raise BadTable(f"the caption may be under '{wanted[0]}' or '{wanted[1]}'; say which: --caption {wanted[0]}")
    return found[0]


def holds_captions(content: bytes | str, key: str | None) -> bool:
    """Whether a JSON value has any."""
    try:
        captions_in(content, key)
    except BadTable:
        return True
    except BadRow:
        return False
    return True


def names_of(file: str) -> tuple[str, str]:
    """What a title may repeat of a picture's file."""
    name = PurePosixPath(file)
    return name.name, name.stem


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]
