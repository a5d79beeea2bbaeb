"""An item's parts in a template of another system (`umarvel_ray/wording.py`), as pieces for the tokenizer."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from umarvel_ray.items.item import Item
from umarvel_ray.items.pictures import Picture
from umarvel_ray.items.template import IMAGE, VIDEO
from umarvel_ray.items.tokens import Piece, Tokens
from umarvel_ray.wording import SLOT, Wording

MOVED = {False: (IMAGE, IMAGE), True: (IMAGE, VIDEO)}  # the picture token of a still and of a video


class Words(NamedTuple):
    """An item's finished texts; `instructed` is both as one."""

    instruction: str
    text: str
    instructed: str


class Filler:
    """Fills the slots of one template. Picklable.

    Args:
        pieces: reads a template's own text, in which control tokens are structure.
    """

    def __init__(self, template: str, wording: Wording, pieces: Callable[[str], list[Piece]]) -> None:
        self._parts = [part if SLOT.fullmatch(part) else pieces(part) for part in SLOT.split(template) if part]
        self._pictures = {moving: pieces(wording.picture.replace(*moved)) for moving, moved in MOVED.items()}

    def closing(self, tokens: Tokens) -> list[int]:
        """The tokens after the last slot, where these begin with a control token."""
        return tokens.ids(self._parts[-1]) if isinstance(self._parts[-1], list) else []

    def __call__(self, words: Words, pictures: Sequence[Picture]) -> list[Piece]:
        """The message, with one picture token for each picture."""
        shown = [piece for picture in pictures for piece in self._pictures[picture.is_video]]
        slots: dict[str, list[Piece]] = {
            "{instruction}": [words.instruction],
            "{pictures}": shown,
            "{text}": [words.text],
            "{instructed}": [words.instructed],
            "{kinds}": [kinds(pictures, bool(words.instructed))],
        }
        return [piece for part in self._parts for piece in (slots[part] if isinstance(part, str) else part)]


def words_of(item: Item, side: str, wording: Wording, default: str, clean: Callable[[str], str]) -> Words:
    """The item's texts as another system's code finishes them.

    Args:
        default: the instruction of an item without one.
        clean: UniIR's cleaning; where it is off, texts stay as they are, control tokens spelled out included, which
            the tokenizer takes for plain text.
    """
    own, text = item.get("instruction"), item.get("text", "")
    instruction = (finished(own) if wording.finish_instruction else own) if own else default
    if wording.cleaning == "all" or (wording.cleaning == "instructed" and (own or side == "document")):
        instruction = clean(instruction)
        return Words(instruction, clean(text), clean(f"{instruction} {text}"))
    gap = " " if instruction and text and not instruction[-1].isspace() else ""
    return Words(instruction, text, f"{instruction}{gap}{text}")


def finished(instruction: str) -> str:
    """Without outer white space, and with a period unless it ends in punctuation of any script."""
    instruction = instruction.strip()
    return instruction if unicodedata.category(instruction[-1]).startswith("P") else f"{instruction}."


def kinds(pictures: Sequence[Picture], has_words: bool) -> str:
    """What a compression prompt says is above it, such as "image and sentence"."""
    shown = {picture.is_video for picture in pictures}
    found = {"image": False in shown, "video": True in shown, "sentence": has_words}
    return " and ".join(word for word, there in found.items() if there)
