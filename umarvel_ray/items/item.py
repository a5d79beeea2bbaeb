"""The item: `{"text"?, "image"?, "video"?, "instruction"?}`; a bare string is text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence, Set
from typing import Any

from umarvel_ray.errors import UserError

SURROGATES = re.compile("[\ud800-\udfff]")  # alone, half of a character: a text that was cut, or broken JSON
BLANK = ("Cc", "Cf", "Zl", "Zp", "Zs")  # Unicode categories of characters that show nothing
ITEM_KEYS = {"text", "image", "video", "instruction"}

Item = dict[str, Any]


def check_item(item: Item | str, where: str) -> Item:
    """Validate an item and return it as a dict without empty values; a bare string is text.

    Its text is made `readable`.

    Args:
        where: names the item (file and row, or id) in errors.

    Raises:
        UserError: not a string or dict, an unknown key, text that is not a string, nothing to embed.
    """
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        raise UserError(f"{where}: an item must be a string or a dict, not {type(item).__name__}")
    if unknown := item.keys() - ITEM_KEYS:
        raise UserError(f"{where}: unknown key '{min(unknown)}'; valid keys are {', '.join(sorted(ITEM_KEYS))}")
    kept = {key: value for key, value in item.items() if value is not None and not _is_empty(value)}
    for key in kept.keys() & {"text", "instruction"}:
        if not isinstance(kept[key], str):
            raise UserError(f"{where}: '{key}' must be text, not {type(kept[key]).__name__}")
        kept[key] = readable(kept[key])
    if not kept.keys() & {"text", "image", "video"}:
        raise UserError(f"{where}: nothing to embed; give a text, an image or a video")
    return kept


def listed(items: Any, what: str) -> list[Any]:
    """The items of a list, an array, a Series, a generator …

    Args:
        what: the word for them in errors, such as "queries".

    Raises:
        UserError: no list of items: a single thing, one whose items have no order, or a table.
    """
    unordered = isinstance(items, str | bytes | bytearray | memoryview | Mapping | Set)
    if not unordered and not hasattr(items, "columns"):  # a data frame's items would be the names of its columns
        try:
            return list(items)
        except TypeError:
            pass
    raise UserError(
        f"{what}: {type(items).__name__} is no list of items; give a text, a dict such as {{'image': picture}}, or a "
        f"list of these"
    )


def readable(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which UTF-8 and tokenizers refuse; "" if it shows nothing."""
    return "" if _is_blank(text) else SURROGATES.sub("\ufffd", text)


def with_instruction(item: Item | str, instruction: str | None) -> Item | str:
    """The item with this instruction, unless it has one of its own."""
    if not instruction or not isinstance(item, str | dict):
        return item
    item = {"text": item} if isinstance(item, str) else item
    return item if item.get("instruction") else item | {"instruction": instruction}


def _is_blank(text: str) -> bool:
    return all(unicodedata.category(character) in BLANK for character in text)


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return _is_blank(value)
    return isinstance(value, Sequence) and len(value) == 0
