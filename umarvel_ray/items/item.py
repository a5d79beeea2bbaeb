"""What an item is: `{"text"?, "image"?, "video"?, "instruction"?}`, where a bare string is text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from umarvel_ray.errors import UserError

ITEM_KEYS = {"text", "image", "video", "instruction"}

Item = dict[str, Any]


def check_item(item: Item | str, where: str) -> Item:
    """The item as a dict without empty values; a bare string is text.

    Args:
        where: names the item (file and row, or id) in errors.

    Raises:
        UserError: not an item, an unknown key, nothing to embed.
    """
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, dict):
        raise UserError(f"{where}: an item is a string or a dict, not {type(item).__name__}")
    if unknown := item.keys() - ITEM_KEYS:
        raise UserError(f"{where}: unknown key '{min(unknown)}'; an item has {', '.join(sorted(ITEM_KEYS))}")
    kept = {key: value for key, value in item.items() if value is not None and not _is_empty(value)}
    for key in ("text", "instruction"):
        if key in kept and not isinstance(kept[key], str):
            raise UserError(f"{where}: '{key}' is {type(kept[key]).__name__}, not text")
    if not kept.keys() & {"text", "image", "video"}:
        raise UserError(f"{where}: nothing to embed; give a text, an image or a video")
    return kept


def _is_empty(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, bytes) and len(value) == 0
