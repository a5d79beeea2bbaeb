"""U-MARVEL's messages: special tokens, text cleaning and the user turn (docs/method.md#item-template)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from umarvel_ray.items.pictures import Picture

EMB, INSTRUCTION_START, INSTRUCTION_END = "<emb>", "<instruction_start>", "<instruction_end>"
IMAGE, VIDEO, VISION_START, VISION_END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer with U-MARVEL's three tokens added in a fixed order, which fixes their ids."""
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    if tokenizer.chat_template is None and (older := Path(path) / "chat_template.json").is_file():
        tokenizer.chat_template = json.loads(older.read_text())["chat_template"]
    tokenizer.add_tokens([EMB, INSTRUCTION_START, INSTRUCTION_END])
    return tokenizer


def format_string(text: str | None) -> str:
    """UniIR's normalization: strip carriage returns, outer spaces and quotes; capitalize; end with punctuation."""
    text = (text or "").replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
    """A conversation as text, by the checkpoint's chat template."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))


def user_turn(text: str, pictures: Sequence[Picture]) -> dict[str, Any]:
    """A user message: pictures first, then the text."""
    return {"role": "user", "content": [*picture_parts(pictures), text_part(text)]}


def picture_parts(pictures: Sequence[Picture]) -> list[dict[str, str]]:
    """The content parts of a message that are placeholders for pictures."""
    return [{"type": "video" if picture.is_video else "image"} for picture in pictures]


def text_part(text: str) -> dict[str, str]:
    """The content part of a message that holds text."""
    return {"type": "text", "text": text}
