"""A U-MARVEL embedder in sentence-transformers 6: from items to the hidden states that the stock Pooling averages.

    model = SentenceTransformer(path, trust_remote_code=True)
    model.encode_query([{"text": "a red car", "instruction": "Find an image that matches the caption."}])
    model.encode_query(["a red car", "a boat"], prompt="Find an image that matches the caption.")
    model.encode_document([{"image": "car.png"}, {"image": picture, "text": "my car"}, "a text"])

umarvel-ray copies this file into every checkpoint of an embedder, beside the `umarvel.json` whose settings it follows;
it imports nothing of umarvel-ray.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

SETTINGS = "umarvel.json"
EMB, START, END = "<emb>", "<instruction_start>", "<instruction_end>"
KEYS = {"text", "image", "instruction"}
MODALITIES = ["text", "image", ("image", "text"), "message"]  # "message" is what a mixed batch is called
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")


class UMarvelEmbedding(InputModule):
    """Renders items with the checkpoint's message template and runs its backbone.

    Its `attention_mask` after `forward` holds the tokens that count: the mean over them is mean or last pooling, with
    the instruction in or out, as `umarvel.json` says.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, record: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.record = record
        self.settings = record["settings"]
        self._emb, self._start, self._end = tokenizer.convert_tokens_to_ids([EMB, START, END])
        self._image = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        # Control tokens written out in a user's text would be read as structure.
        self._control = re.compile("|".join(re.escape(token) for token in tokenizer.get_added_vocab()))

    @property
    def modalities(self) -> list[Any]:
        return MODALITIES

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> UMarvelEmbedding:
        """Load from a directory or a hub name, in float32 as umarvel-ray's Embedder does.

        Args:
            model_kwargs: for transformers, such as {"dtype": "bfloat16", "attn_implementation": "sdpa"}.
        """
        hub = {"token": token, "revision": revision, "local_files_only": local_files_only}
        record = cls.load_config(model_name_or_path, config_filename=SETTINGS, cache_folder=cache_folder, **hub)
        hub["cache_dir"] = cache_folder
        return cls(
            AutoModel.from_pretrained(model_name_or_path, **{"dtype": "float32"} | (model_kwargs or {}), **hub),
            AutoTokenizer.from_pretrained(model_name_or_path, **hub),
            AutoImageProcessor.from_pretrained(model_name_or_path, backend="pil", **hub),  # resizes as training did
            record,
        )

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(output_path)
        (Path(output_path) / SETTINGS).write_text(json.dumps(self.record, indent=2) + "\n")

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Tokens, pixels and the pooling mask of a batch.

        Args:
            inputs: strings, pictures, or {"text"?, "image"? (one or a list), "instruction"?}; an image is a path, data
                URI, bytes or PIL picture.
            prompt: the instruction of every input that brings none.
            task: "query", "document" or None.

        Raises:
            ValueError: nothing to embed, an unknown key, an instruction on a document.
        """
        items = [_item(given, prompt, task) for given in inputs]
        pictures = [self._resized(open_picture(picture)) for item in items for picture in item["image"]]
        features = dict(self.image_processor(pictures, return_tensors="pt")) if pictures else {}
        merged = self.image_processor.merge_size**2
        runs = iter([int(grid.prod()) // merged for grid in features.get("image_grid_thw", [])])
        rendered = [
            re.sub(re.escape(self._image), lambda _: self._image * next(runs), self._render(item)) for item in items
        ]
        tokens = self.tokenizer(
            rendered, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        )
        ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        features |= {"input_ids": ids, "attention_mask": attention_mask}
        features["pool_mask"] = self._counts(ids).long() * attention_mask
        if self.settings["positions"] == "sequential":
            features["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
        else:  # transformers computes M-RoPE positions from these
            features["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        return features

    def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        given = {name: features[name] for name in MODEL_INPUTS if name in features}
        hidden = self.model(**given, use_cache=False).last_hidden_state
        return features | {"token_embeddings": hidden.float(), "attention_mask": features["pool_mask"]}

    def _resized(self, picture: Image.Image) -> Image.Image:
        """As U-MARVEL's own code does before the processor, where the settings say so: to multiples of 28."""
        if not self.settings.get("resize_twice"):
            return picture
        budget = self.settings["min_pixels"], self.settings["max_pixels"]
        height, width = smart_resize(picture.height, picture.width, 28, *budget)
        return picture.resize((width, height), Image.Resampling.BICUBIC)

    def _render(self, item: dict[str, Any]) -> str:
        content = [{"type": "image"}] * len(item["image"]) + [{"type": "text", "text": self._text(item)}]
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": f"{EMB}."}]},
        ]
        return self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=self.settings["generation_prompt"]
        )

    def _text(self, item: dict[str, Any]) -> str:
        limit = self.settings["max_text_tokens"]
        text, instruction = (self._control.sub(" ", item[key]) for key in ("text", "instruction"))
        if item["instruction"]:
            start, end = (START, END) if self.settings["instruction_mask"] else ("", "")
            text = f"{start}{self._cut(_tidy(instruction), max(limit - 2, 0))}{end} {text}"
        text = self._cut(_tidy(text), limit)
        if self.settings["compression_prompt"]:
            shown = [word for key, word in (("image", "image"), ("text", "sentence")) if item[key]]
            text += f"\nSummarize above {' and '.join(shown)} in one word: "
        return text

    def _cut(self, text: str, tokens: int) -> str:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) <= tokens:
            return text
        return self.tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False).rstrip("\ufffd")

    def _counts(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are pooled, bool (B, L): the one before <emb>, or all outside the instruction."""
        if self.settings["pooling"] == "last":
            return (ids == self._emb).roll(-1, dims=1)
        opened, closed = ids == self._start, ids == self._end
        return opened.cumsum(1) == closed.cumsum(1) - closed.long()


def open_picture(image: str | Path | bytes | Image.Image) -> Image.Image:
    """Upright RGB; transparency laid on white, 16-bit grey scaled to 8, the first frame of an animation."""
    if isinstance(image, str) and image.startswith("data:"):
        image = base64.b64decode(image.partition(",")[2])
    if isinstance(image, bytes):
        image = BytesIO(image)
    picture = image if isinstance(image, Image.Image) else Image.open(image)
    picture.load()
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    elif picture.mode == "F":
        picture = Image.fromarray(np.asarray(picture).clip(0, 255).astype(np.uint8))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _item(given: Any, prompt: str | None, task: str | None) -> dict[str, Any]:
    """{"text": str, "image": list, "instruction": str} of whatever sentence-transformers takes as one input."""
    item = given if isinstance(given, dict) else {infer_modality(given, MODALITIES): given}
    if unknown := item.keys() - KEYS:
        raise ValueError(f"unknown key '{min(unknown)}'; an input has {', '.join(sorted(KEYS))}")
    text, images, instruction = item.get("text") or "", item.get("image"), item.get("instruction") or prompt or ""
    if not isinstance(images, list | tuple):
        images = [] if images is None or images == "" else [images]
    if not text and not images:
        raise ValueError("nothing to embed; give a text or an image")
    if task == "document" and instruction:
        raise ValueError("a document carries no instruction; put it on the query")
    return {"text": text, "image": images, "instruction": instruction}


def _tidy(text: str) -> str:
    """UniIR's clean-up: no carriage returns, outer spaces or quotes; capital first letter; closing punctuation."""
    text = text.replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."
