"""The item: `{"text"?, "image"?, "video"?, "instruction"?}`; a bare string is text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from umarvel_ray.errors import UserError

ITEM_KEYS = {"text", "image", "video", "instruction"}

Item = dict[str, Any]


def check_item(item: Item | str, where: str) -> Item:
    """Validate an item and return it as a dict without empty values; a bare string is text.

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
    for key in ("text", "instruction"):
        if key in kept and not isinstance(kept[key], str):
            raise UserError(f"{where}: '{key}' must be text, not {type(kept[key]).__name__}")
    if not kept.keys() & {"text", "image", "video"}:
        raise UserError(f"{where}: nothing to embed; give a text, an image or a video")
    return kept


def with_instruction(item: Item | str, instruction: str | None) -> Item | str:
    """The item with this instruction, unless it has one of its own."""
    if not instruction or not isinstance(item, str | dict):
        return item
    item = {"text": item} if isinstance(item, str) else item
    return item if item.get("instruction") else item | {"instruction": instruction}


def _is_empty(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, bytes) and len(value) == 0
