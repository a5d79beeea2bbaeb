"""U-MARVEL's messages: special tokens, text cleaning and the user turn (docs/method.md#items)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from umarvel_ray.items.pictures import Picture

EMB, INSTRUCTION_START, INSTRUCTION_END = "<emb>", "<instruction_start>", "<instruction_end>"
IMAGE, VIDEO, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer with U-MARVEL's three tokens, always in the same order, so with the same ids."""
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    if tokenizer.chat_template is None and (older := Path(path) / "chat_template.json").is_file():
        tokenizer.chat_template = json.loads(older.read_text())["chat_template"]
    tokenizer.add_tokens([EMB, INSTRUCTION_START, INSTRUCTION_END])
    return tokenizer


def format_string(text: str | None) -> str:
    """UniIR's clean-up: no carriage returns, outer spaces or quotes; capital first letter; closing punctuation."""
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def user_turn(text: str, pictures: Sequence[Picture]) -> dict:
    """A user message: pictures first, then the text."""
    return {"role": "user", "content": [*picture_parts(pictures), text_part(text)]}


def picture_parts(pictures: Sequence[Picture]) -> list[dict[str, str]]:
    """The content parts that stand for the pictures in a message."""
    return [{"type": "video" if picture.is_video else "image"} for picture in pictures]


def text_part(text: str) -> dict[str, str]:
    """The content part that holds a text."""
    return {"type": "text", "text": text}
