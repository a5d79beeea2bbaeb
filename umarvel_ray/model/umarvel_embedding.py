"""A U-MARVEL embedder in sentence-transformers 6: from items to the hidden states that the stock Pooling averages.

    model = SentenceTransformer(path, trust_remote_code=True)
    model.encode_query([{"text": "a red car", "instruction": "Find an image that matches the caption."}])
    model.encode_query(["a red car", "a boat"], prompt="Find an image that matches the caption.")
    model.encode_document([{"image": "car.png"}, {"image": picture, "text": "my car"}, {"video": "car.mp4"}, "a text"])

umarvel-ray copies this file into every checkpoint of an embedder, beside the `umarvel.json` whose settings it follows;
it imports nothing of umarvel-ray.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

SETTINGS = "umarvel.json"
EMB, START, END = "<emb>", "<instruction_start>", "<instruction_end>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
KEYS = {"text", "image", "video", "instruction"}
MODALITIES = ["text", "image", "video", ("image", "text"), "message"]  # "message" is what a mixed batch is called
PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", *PICTURES)


class Clip(NamedTuple):
    """A video as the tower reads it: patches (n, values), their grid in time, height and width, each step's second."""

    patches: torch.Tensor
    grid: tuple[int, int, int]
    seconds: list[float]


class Span(NamedTuple):
    """Tokens of one picture, or of a video's steps: their grid, and how far its steps lie apart in time."""

    grid: tuple[int, int, int]
    interval: float = 1.0


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
        self._pictures = [model.config.image_token_id, model.config.video_token_id]
        self._image, self._video = tokenizer.convert_ids_to_tokens(self._pictures)
        self._timestamps = model.config.model_type == "qwen3_vl"  # each step of a video brings its second and own tags
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
            inputs: strings, pictures, or {"text"?, "image"? (one or a list), "video"?, "instruction"?}; an image is a
                path, data URI, bytes or PIL picture; a video: see `open_video`.
            prompt: the instruction of every input that brings none.
            task: "query", "document" or None.

        Raises:
            ValueError: nothing to embed, an unknown key, an instruction on a document.
            ImportError: a video file, and no PyAV to decode it.
        """
        items = [_item(given, prompt, task) for given in inputs]
        stills = [self._resized(open_picture(image)) for item in items for image in item["image"]]
        features = dict(self.image_processor(stills, return_tensors="pt")) if stills else {}
        grids = iter(features.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long)).tolist())
        clips = [[self._clip(video) for video in item["video"]] for item in items]
        if moving := [clip for own in clips for clip in own]:
            features["pixel_values_videos"] = torch.cat([clip.patches for clip in moving])
            features["video_grid_thw"] = torch.tensor([clip.grid for clip in moving])
        spans = [
            [*(self._span(next(grids)) for _ in item["image"]), *(span for clip in own for span in self._steps(clip))]
            for item, own in zip(items, clips, strict=True)
        ]
        rendered = [self._render(*given) for given in zip(items, spans, clips, strict=True)]
        tokens = self.tokenizer(
            rendered, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        )
        ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        features |= {"input_ids": ids, "attention_mask": attention_mask}
        features["pool_mask"] = self._counts(ids).long() * attention_mask
        if self.settings["positions"] == "sequential":
            features["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
        else:
            shown = np.isin(ids, self._pictures)
            positions = [rotary_positions(*given) for given in zip(shown, spans, strict=True)]
            features["position_ids"] = torch.from_numpy(np.stack(positions, axis=1))
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

    def _clip(self, video: Any) -> Clip:
        """At most `video_frames` frames within `max_video_pixels`, the last repeated where a step wants more."""
        frames, seconds = open_video(video, self.settings["video_frames"])
        times = self.image_processor.temporal_patch_size
        short = -len(frames) % times
        frames, seconds = [*frames, *frames[-1:] * short], [*seconds, *seconds[-1:] * short]
        least, most = self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]
        most = min(most, self.settings["max_video_pixels"] // len(frames))
        size = {"shortest_edge": min(least, most), "longest_edge": most}
        read = self.image_processor([self._resized(frame) for frame in frames], size=size, return_tensors="pt")
        _, rows, columns = read["image_grid_thw"][0].tolist()
        steps = len(frames) // times
        # As a still, each frame fills all the times of a step; as a video it keeps its own.
        patches = read["pixel_values"].view(steps, times, rows * columns, 3, times, -1)
        patches = torch.stack([patches[:, time, :, :, time] for time in range(times)], dim=3)
        middles = [(seconds[i] + seconds[i + times - 1]) / 2 for i in range(0, len(seconds), times)]
        return Clip(patches.reshape(steps * rows * columns, -1), (steps, rows, columns), middles)

    def _steps(self, clip: Clip) -> list[Span]:
        steps, rows, columns = clip.grid
        if self._timestamps:
            return [self._span((1, rows, columns))] * steps
        rate = getattr(self.model.config.vision_config, "tokens_per_second", None)  # Qwen2.5-VL; others count the steps
        return [self._span(clip.grid, rate * (clip.seconds[1] - clip.seconds[0]) if rate and steps > 1 else 1.0)]

    def _span(self, grid: Sequence[int], interval: float = 1.0) -> Span:
        steps, rows, columns = grid
        merge = self.image_processor.merge_size
        return Span((steps, rows // merge, columns // merge), interval)

    def _render(self, item: dict[str, Any], spans: list[Span], clips: list[Clip]) -> str:
        content = [{"type": kind} for kind in ("image", "video") for _ in item[kind]]
        turns = [
            {"role": "user", "content": [*content, {"type": "text", "text": self._text(item)}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"{EMB}."}]},
        ]
        rendered = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=self.settings["generation_prompt"]
        )
        if self._timestamps:
            tag = f"{VISION_START}{self._video}{VISION_END}"
            steps = "".join(f"<{second:.1f} seconds>{tag}" for clip in clips for second in clip.seconds)
            rendered = rendered.replace(tag, steps)
        runs = iter(spans)
        shown = f"{re.escape(self._image)}|{re.escape(self._video)}"
        return re.sub(shown, lambda found: found[0] * int(np.prod(next(runs).grid)), rendered)

    def _text(self, item: dict[str, Any]) -> str:
        limit = self.settings["max_text_tokens"]
        text, instruction = (self._control.sub(" ", item[key]) for key in ("text", "instruction"))
        if item["instruction"]:
            start, end = (START, END) if self.settings["instruction_mask"] else ("", "")
            text = f"{start}{self._cut(_tidy(instruction), max(limit - 2, 0))}{end} {text}"
        text = self._cut(_tidy(text), limit)
        if self.settings["compression_prompt"]:
            words = {"image": "image", "video": "video", "text": "sentence"}
            shown = [word for key, word in words.items() if item[key]]
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
    picture = image if isinstance(image, Image.Image) else Image.open(_source(image))
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


def open_video(video: Any, most: int) -> tuple[list[Image.Image], list[float]]:
    """At most `most` frames of a video, evenly apart, the ends among them, and the second each is shown at.

    Args:
        video: a path, data URI or bytes, which PyAV decodes; or its frames, taken as one a second: a list of pictures,
            or an array uint8 (frames, 3, height, width).

    Raises:
        ValueError: no frame. ImportError: no PyAV.
    """
    if isinstance(video, np.ndarray | torch.Tensor):
        video = [Image.fromarray(frame) for frame in np.asarray(video).transpose(0, 2, 3, 1)]
    count = len(video) if isinstance(video, list | tuple) else sum(1 for _ in _decode(video))
    if not count:
        raise ValueError("the video has no frame")
    chosen = np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
    if isinstance(video, list | tuple):
        frames = [open_picture(video[number]) for number in chosen]
        return [frame.resize(frames[0].size) for frame in frames], [float(number) for number in chosen]
    kept = [(number, frame) for number, frame in enumerate(_decode(video)) if number in chosen]
    seconds = [float(number if frame.time is None else frame.time) for number, frame in kept]
    pictures = [frame.to_image().rotate(frame.rotation, expand=True) for _, frame in kept]
    return pictures, [second - seconds[0] for second in seconds]


def rotary_positions(shown: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """M-RoPE positions int64 (3, L): a picture's tokens lie on its own grid, the text goes on behind the furthest.

    transformers 5.23 forgets the time axis there, which tells for videos with more steps than rows and columns.

    Args:
        shown: bool (L,), True on pictures' tokens; each span is a run of them, in order.
    """
    positions = np.empty((3, len(shown)), dtype=np.int64)
    at = now = 0
    for span in spans:
        start = at + int(shown[at:].argmax())
        positions[:, at:start] = now + np.arange(start - at)
        now += start - at
        at = start + int(np.prod(span.grid))
        axes = np.indices(span.grid).reshape(3, -1)
        axes[0] = axes[0] * span.interval
        positions[:, start:at] = now + axes
        now += int(axes.max()) + 1
    positions[:, at:] = now + np.arange(len(shown) - at)
    return positions


def _decode(video: str | Path | bytes) -> Iterator[Any]:
    try:
        import av
    except ImportError:
        raise ImportError("a video file needs PyAV: pip install av, or give its frames as a list of pictures") from None
    with av.open(_source(video)) as container:
        yield from container.decode(video=0)


def _source(given: str | Path | bytes) -> str | Path | BytesIO:
    """What PIL and PyAV open: a path stays as it is."""
    if isinstance(given, str) and given.startswith("data:"):
        given = base64.b64decode(given.partition(",")[2])
    return BytesIO(given) if isinstance(given, bytes) else given


def _item(given: Any, prompt: str | None, task: str | None) -> dict[str, Any]:
    """{"text": str, "image": list, "video": list, "instruction": str} of what sentence-transformers takes as one."""
    item = given if isinstance(given, dict) else {infer_modality(given, MODALITIES): given}
    if unknown := item.keys() - KEYS:
        raise ValueError(f"unknown key '{min(unknown)}'; an input has {', '.join(sorted(KEYS))}")
    text, instruction = item.get("text") or "", item.get("instruction") or prompt or ""
    images, video = item.get("image"), item.get("video")
    if not isinstance(images, list | tuple):
        images = [] if images is None or images == "" else [images]
    videos = [] if video is None or (isinstance(video, str | list | tuple) and not video) else [video]
    if not text and not images and not videos:
        raise ValueError("nothing to embed; give a text, an image or a video")
    if task == "document" and instruction:
        raise ValueError("a document carries no instruction; put it on the query")
    return {"text": text, "image": images, "video": videos, "instruction": instruction}


def _tidy(text: str) -> str:
    """UniIR's clean-up: no carriage returns, outer spaces or quotes; capital first letter; closing punctuation."""
    text = text.replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."
