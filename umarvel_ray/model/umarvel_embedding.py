"""A U-MARVEL embedder in sentence-transformers 6: items to the hidden states that the stock Pooling module averages.

    model = SentenceTransformer(path, trust_remote_code=True)
    model.encode_query([{"text": "a red car", "instruction": "Find an image that matches the caption."}])
    model.encode_query(["a red car", "a boat"], prompt="Find an image that matches the caption.")
    model.encode_document([{"image": "car.png"}, {"image": picture, "text": "my car"}, {"video": "car.mp4"}, "a text"])

umarvel-ray copies this file into every embedder checkpoint, next to the `umarvel.json` whose settings it follows. It
does not import umarvel-ray.
"""

from __future__ import annotations

import base64
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

SETTINGS = "umarvel.json"
EMB, START, END = "<emb>", "<instruction_start>", "<instruction_end>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TEXT_SLOT = "\x00"
PNG, PNG_NOTES = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
SURROGATES = re.compile("[\ud800-\udfff]")
BLANK = ("Cc", "Cf", "Zl", "Zp", "Zs")  # Unicode categories of characters that show nothing
KEYS = {"text", "image", "video", "instruction"}
MODALITIES: list[Any] = ["text", "image", "video", ("image", "text"), "message"]  # "message": a mixed batch
PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", *PICTURES)


class Clip(NamedTuple):
    """A video as the vision tower reads it.

    patches: float32 (n, patch_dim); grid: temporal patches, rows, columns; seconds: time of each temporal patch.
    """

    patches: torch.Tensor
    grid: tuple[int, int, int]
    seconds: list[float]


class Span(NamedTuple):
    """Consecutive picture tokens: their grid (time, rows, columns), and the distance between positions in time."""

    grid: tuple[int, int, int]
    interval: float = 1.0


class UMarvelEmbedding(InputModule):
    """Renders items with the checkpoint's message template and runs its backbone.

    `forward` replaces `attention_mask` by the pooling mask: the mean over its tokens is mean or last pooling, with or
    without the instruction, as `umarvel.json` says.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, record: dict[str, Any]) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.image_processor: Any = image_processor
        self.record = record
        self.settings = record["settings"]
        self._emb, self._start, self._end = tokenizer.convert_tokens_to_ids([EMB, START, END])
        self._pictures = [model.config.image_token_id, model.config.video_token_id]
        self._image, self._video = tokenizer.convert_ids_to_tokens(self._pictures)
        self._timestamps = model.config.model_type == "qwen3_vl"  # a time and tags of its own per temporal patch
        self._controls: dict[str, int] = tokenizer.get_added_vocab()
        longest_first = sorted(self._controls, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)))
        # A vocabulary may hold its control tokens as words too; an unknown character is no structure.
        self._unwanted = set(self._controls.values()) - {tokenizer.unk_token_id}
        # For users' texts: does not know the control tokens, so no text becomes structure.
        self._plain = Tokenizer(tokenizer.backend_tokenizer.model)
        for part in ("normalizer", "pre_tokenizer"):
            if (own := getattr(tokenizer.backend_tokenizer, part)) is not None:
                setattr(self._plain, part, own)

    @property
    def modalities(self) -> list[Any]:
        return MODALITIES

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        model_kwargs: dict[str, Any] | None = None,
        **_: Any,
    ) -> UMarvelEmbedding:
        """Load from a directory or a hub name, in float32 like umarvel-ray's Embedder.

        Args:
            subfolder, init_defaults: not used; part of the base class's signature.
            model_kwargs: for transformers, such as {"dtype": "bfloat16", "attn_implementation": "sdpa"}.
        """
        hub: dict[str, Any] = {"token": token, "revision": revision, "local_files_only": local_files_only}
        record = cls.load_config(model_name_or_path, config_filename=SETTINGS, cache_folder=cache_folder, **hub)
        hub["cache_dir"] = cache_folder
        return cls(
            AutoModel.from_pretrained(model_name_or_path, **{"dtype": "float32"} | (model_kwargs or {}), **hub),
            AutoTokenizer.from_pretrained(model_name_or_path, **hub),
            AutoImageProcessor.from_pretrained(
                model_name_or_path,
                backend="pil",  # resizes as in training
                **hub,
            ),
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
            inputs: strings, pictures, or {"text"?, "image"? (one or a list), "video"?, "instruction"?}. An image is a
                path, a data URI, bytes or a PIL image; for videos see `open_video`.
            prompt: the instruction for inputs without one.
            task: "query", "document" or None.

        Returns:
            input_ids, attention_mask and pool_mask: int64 (B, L); position_ids: int64 (B, L) or (B, L, 3); and, if
            there are pictures, the vision tower's inputs and how many pictures and videos each item has. Losses that
            cut a batch into smaller ones slice the first axis of these.

        Raises:
            ValueError: nothing to embed, an unknown key, or an instruction on a document.
            ImportError: a video file without PyAV to decode it.
        """
        items = [_item(value, prompt, task) for value in inputs]
        counts = {
            f"num_{kind}s_per_sample": torch.tensor([len(item[kind]) for item in items]) for kind in ("image", "video")
        }
        size = self.image_processor.size
        budget = size["shortest_edge"], size["longest_edge"]
        stills = [self._resized(open_picture(image), *budget) for item in items for image in item["image"]]
        features = dict(self._patches(stills)) if stills else {}
        grids = iter(features.get("image_grid_thw", torch.empty(0, 3, dtype=torch.long)).tolist())
        clips = [[self._clip(video) for video in item["video"]] for item in items]
        if moving := [clip for own in clips for clip in own]:
            features["pixel_values_videos"] = torch.cat([clip.patches for clip in moving])
            features["video_grid_thw"] = torch.tensor([clip.grid for clip in moving])
        spans = [
            [*(self._span(next(grids)) for _ in item["image"]), *(span for clip in own for span in self._spans(clip))]
            for item, own in zip(items, clips, strict=True)
        ]
        rows = [self._ids(self._render(*parts)) for parts in zip(items, spans, clips, strict=True)]
        tokens = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        features |= {"input_ids": ids, "attention_mask": attention_mask, **(counts if features else {})}
        features["pool_mask"] = self._pooled(ids).long() * attention_mask
        if self.settings["positions"] == "sequential":
            features["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
        else:
            shown = np.isin(ids, self._pictures)
            positions = [rotary_positions(*parts) for parts in zip(shown, spans, strict=True)]
            features["position_ids"] = torch.from_numpy(np.stack([own.T for own in positions]))
        return features

    def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        """Add the token embeddings, float32 (B, L, D), and set `attention_mask` to the pooling mask."""
        inputs = {name: features[name] for name in MODEL_INPUTS if name in features}
        if inputs["position_ids"].ndim > 2:
            inputs["position_ids"] = inputs["position_ids"].permute(2, 0, 1)  # M-RoPE: (3, B, L)
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        return features | {"token_embeddings": hidden.float(), "attention_mask": features["pool_mask"]}

    def _resized(self, picture: Image.Image, lower: int, upper: int) -> Image.Image:
        """To multiples of a merged patch; before, if the settings ask for it, to multiples of 28 as U-MARVEL's code."""
        processor = self.image_processor
        steps = [(processor.patch_size * processor.merge_size, lower, upper)]
        if self.settings.get("resize_twice"):
            steps.insert(0, (28, self.settings["min_pixels"], self.settings["max_pixels"]))
        for step in steps:
            height, width = smart_resize(picture.height, picture.width, *step)
            picture = picture.resize((width, height), processor.resample)
        return picture

    def _patches(self, pictures: list[Image.Image]) -> Any:
        """The processor's patches and grids of resized pictures."""
        return self.image_processor(pictures, do_resize=False, return_tensors="pt")

    def _clip(self, video: Any) -> Clip:
        """At most `video_frames` frames within `max_video_pixels`; the last is repeated to fill a temporal patch."""
        frames, seconds = open_video(video, self.settings["video_frames"], self.settings.get("video_fps"))
        depth = self.image_processor.temporal_patch_size  # frames per temporal patch
        missing = -len(frames) % depth
        frames, seconds = [*frames, *frames[-1:] * missing], [*seconds, *seconds[-1:] * missing]
        lower, upper = self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]
        upper = min(upper, self.settings["max_video_pixels"] // len(frames))
        read = self._patches([self._resized(frame, min(lower, upper), upper) for frame in frames])
        _, rows, columns = read["image_grid_thw"][0].tolist()
        times = len(frames) // depth
        # The processor repeats a still image `depth` times; in a video each frame fills its own place of the patch.
        patches = read["pixel_values"].view(times, depth, rows * columns, 3, depth, -1)
        patches = torch.stack([patches[:, frame, :, :, frame] for frame in range(depth)], dim=3)
        middles = [(seconds[i] + seconds[i + depth - 1]) / 2 for i in range(0, len(seconds), depth)]
        return Clip(patches.reshape(times * rows * columns, -1), (times, rows, columns), middles)

    def _spans(self, clip: Clip) -> list[Span]:
        times, rows, columns = clip.grid
        if self._timestamps:
            return [self._span((1, rows, columns))] * times
        rate = getattr(self.model.config.vision_config, "tokens_per_second", None)  # Qwen2.5-VL; others count patches
        return [self._span(clip.grid, rate * (clip.seconds[1] - clip.seconds[0]) if rate and times > 1 else 1.0)]

    def _span(self, grid: Sequence[int], interval: float = 1.0) -> Span:
        times, rows, columns = grid
        merge = self.image_processor.merge_size
        return Span((times, rows // merge, columns // merge), interval)

    def _render(self, item: dict[str, Any], spans: list[Span], clips: list[Clip]) -> list[str | int]:
        """The conversation in pieces: texts, and the ids of control tokens."""
        content = [{"type": kind} for kind in ("image", "video") for _ in item[kind]]
        turns = [
            {"role": "user", "content": [*content, {"type": "text", "text": TEXT_SLOT}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"{EMB}."}]},
        ]
        rendered: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=self.settings["generation_prompt"]
        )
        if self._timestamps:
            tag = f"{VISION_START}{self._video}{VISION_END}"
            timed = "".join(f"<{second:.1f} seconds>{tag}" for clip in clips for second in clip.seconds)
            rendered = rendered.replace(tag, timed)
        runs = iter(spans)
        shown = f"{re.escape(self._image)}|{re.escape(self._video)}"
        rendered = re.sub(shown, lambda found: found[0] * int(np.prod(next(runs).grid)), rendered)
        before, _, after = rendered.partition(TEXT_SLOT)
        return [*self._pieces(before), *self._text(item), *self._pieces(after)]

    def _text(self, item: dict[str, Any]) -> list[str | int]:
        limit = self.settings["max_text_tokens"]
        text, instruction = (self._spelled.sub(" ", item[key].replace("\r", "")) for key in ("text", "instruction"))
        pieces: list[str | int] = [self._cut(_tidy(text), limit)]
        if item["instruction"]:
            masked, instruction = self.settings["instruction_mask"], _tidy(instruction)
            if item["text"] and len(self._text_ids(instruction)) >= limit - 2:
                raise ValueError(
                    f"the instruction leaves no room for a text within max_text_tokens ({limit}); shorten it"
                )
            instruction = self._cut(instruction, max(limit - 2, 0))
            opened = f"{START}{instruction}{END}" if masked else instruction
            text = _tidy(f"{opened} {text}")
            pieces = [self._cut(text, limit)]
            if masked:
                left = max(limit - 2 - len(self._text_ids(instruction)), 0)
                pieces = [self._start, instruction, self._end, self._cut(text.removeprefix(opened), left)]
        if self.settings["compression_prompt"]:
            words = {"image": item["image"], "video": item["video"], "sentence": item["text"] or item["instruction"]}
            shown = [word for word, there in words.items() if there]
            pieces.append(f"\nSummarize above {' and '.join(shown)} in one word: ")
        return pieces

    def _pieces(self, rendered: str) -> list[str | int]:
        texts, controls = self._spelled.split(rendered), self._spelled.findall(rendered)
        pieces: list[str | int] = [texts[0]]
        for control, text in zip(controls, texts[1:], strict=True):
            pieces += [self._controls[control], text]
        return [piece for piece in pieces if piece != ""]

    def _ids(self, pieces: list[str | int]) -> list[int]:
        """Token ids; texts that follow one another are tokenized as one."""
        ids: list[int] = []
        for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            run = list(group)
            ids += self._text_ids("".join(map(str, run))) if is_text else map(int, run)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        return [one for one in self._plain.encode(text, add_special_tokens=False).ids if one not in self._unwanted]

    def _cut(self, text: str, tokens: int) -> str:
        ids = self._text_ids(text)
        if len(ids) <= tokens:
            return text
        kept: str = self.tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False)
        return kept.rstrip("\ufffd")

    def _pooled(self, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens are pooled, bool (B, L): the one before <emb>, or all outside the instruction."""
        is_emb, is_start, is_end = (torch.eq(ids, token) for token in (self._emb, self._start, self._end))
        if self.settings["pooling"] == "last":
            return is_emb.roll(-1, dims=1)
        return torch.eq(is_start.cumsum(1), is_end.cumsum(1) - is_end.long())


def smart_resize(height: int, width: int, side: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Multiples of `side`, one at least, whose product is within the budget if the shape allows it.

    transformers' own rounds a short side to none, finds the area too small, and enlarges the picture.

    Raises:
        ValueError: one side is more than 200 times the other.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"aspect ratio over 200: {width} × {height} pixels")
    rows, columns = (max(side, round(length / side) * side) for length in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return max(side, int(height / shrink / side) * side), max(side, int(width / shrink / side) * side)
    if rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
    return rows, columns


def open_picture(image: str | Path | bytes | Image.Image) -> Image.Image:
    """Upright RGB: transparency on white, 16-bit gray scaled to 8 bits, the first frame of an animation."""
    picture = image if isinstance(image, Image.Image) else Image.open(_without_png_notes(image))
    picture.load()
    with suppress(Exception):  # a damaged EXIF block turns nothing
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    elif picture.mode == "F":
        picture = Image.fromarray(np.asarray(picture).clip(0, 255).astype(np.uint8))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _without_png_notes(image: str | Path | bytes) -> BytesIO:
    """A picture's bytes, without a PNG's texts and color profile, which Pillow refuses when long or damaged."""
    source = _source(image)
    content = source.getvalue() if isinstance(source, BytesIO) else Path(source).read_bytes()
    if not content.startswith(PNG):
        return BytesIO(content)
    kept, start = [PNG], len(PNG)
    while start < len(content):
        stop = start + 12 + int.from_bytes(content[start : start + 4])  # its length, type and checksum take 12 bytes
        if content[start + 4 : start + 8] not in PNG_NOTES:
            kept.append(content[start:stop])
        start = stop
    return BytesIO(b"".join(kept))


def open_video(video: Any, max_frames: int, fps: float | None = None) -> tuple[list[Image.Image], list[float]]:
    """At most `max_frames` evenly spaced frames of a video, the first and last included, and their times in seconds.

    Args:
        video: a path, a data URI or bytes, decoded by PyAV; or frames at one per second: a list of pictures, or uint8
            (frames, 3, height, width).
        fps: take about so many frames of each second, an even number of at least 4.

    Raises:
        ValueError: the video has no frames.
        ImportError: PyAV is not installed.
    """
    if isinstance(video, np.ndarray | torch.Tensor):
        video = [Image.fromarray(frame) for frame in np.asarray(video).transpose(0, 2, 3, 1)]
    times = list(range(len(video))) if isinstance(video, list | tuple) else [frame.time for frame in _decode(video)]
    count = len(times)
    if not count:
        raise ValueError("the video has no frames")
    taken = min(max_frames, count)
    if fps:
        timed = times[0] is not None and times[-1] is not None and count > 1
        seconds = (times[-1] - times[0]) * count / (count - 1) if timed else count
        taken = min(max(int(seconds * fps), 4), taken)
        taken = max(1, taken - taken % 2)
    chosen = np.linspace(0, count - 1, taken).round().astype(int).tolist()
    if isinstance(video, list | tuple):
        return _of_one_size([open_picture(video[number]) for number in chosen]), [float(number) for number in chosen]
    kept = [(number, frame) for number, frame in enumerate(_decode(video)) if number in chosen]
    seconds = [float(number if frame.time is None else frame.time) for number, frame in kept]
    pictures = [frame.to_image().rotate(frame.rotation, expand=True) for _, frame in kept]
    return _of_one_size(pictures), [second - seconds[0] for second in seconds]


def _of_one_size(frames: list[Image.Image]) -> list[Image.Image]:
    """Frames as large as the first: a stream may change its resolution or orientation."""
    return [frame if frame.size == frames[0].size else frame.resize(frames[0].size) for frame in frames]


def rotary_positions(shown: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """M-RoPE positions int64 (3, L): picture tokens lie on their grid; text continues after the largest position.

    transformers 5.23 ignores the time axis for that largest position, which matters for videos with more temporal
    patches than rows and columns.

    Args:
        shown: bool (L,), True on picture tokens.
        spans: the runs of picture tokens, in order.
    """
    positions = np.empty((3, len(shown)), dtype=np.int64)
    end = position = 0  # of what is done: the next token, and the next text position
    for span in spans:
        start = end + int(shown[end:].argmax())
        positions[:, end:start] = position + np.arange(start - end)
        position += start - end
        end = start + int(np.prod(span.grid))
        axes = np.indices(span.grid).reshape(3, -1)
        axes[0] = axes[0] * span.interval
        positions[:, start:end] = position + axes
        position += int(axes.max()) + 1
    positions[:, end:] = position + np.arange(len(shown) - end)
    return positions


def _decode(video: str | Path | bytes) -> Iterator[Any]:
    try:
        import av
    except ImportError:
        raise ImportError("a video file needs PyAV: pip install av, or pass its frames as a list of pictures") from None
    container: Any = av.open(_source(video))
    with container:
        yield from container.decode(video=0)


def _source(file: str | Path | bytes) -> str | Path | BytesIO:
    """What PIL and PyAV can open: a path, or a buffer with the bytes or the data URI's content."""
    if isinstance(file, str) and file.startswith("data:"):
        file = base64.b64decode(file.partition(",")[2])
    return BytesIO(file) if isinstance(file, bytes) else file


def _item(value: Any, prompt: str | None, task: str | None) -> dict[str, Any]:
    """{"text": str, "image": list, "video": list, "instruction": str} of one sentence-transformers input."""
    item = value if isinstance(value, dict) else {infer_modality(value, MODALITIES): value}
    if unknown := item.keys() - KEYS:
        raise ValueError(f"unknown key '{min(unknown)}'; an input has {', '.join(sorted(KEYS))}")
    text, instruction = (_visible(value or "") for value in (item.get("text"), item.get("instruction") or prompt))
    images, video = item.get("image"), item.get("video")
    if not isinstance(images, list | tuple):
        images = [] if images is None or images == "" else [images]
    videos = [] if video is None or (isinstance(video, str | list | tuple) and not video) else [video]
    if not text and not images and not videos:
        raise ValueError("nothing to embed; give a text, an image or a video")
    if task == "document" and instruction:
        raise ValueError("a document carries no instruction; put it on the query")
    return {"text": text, "image": images, "video": videos, "instruction": instruction}


def _visible(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which tokenizers refuse; "" if it shows nothing."""
    shows = any(unicodedata.category(character) not in BLANK for character in text)
    return SURROGATES.sub("\ufffd", text) if shows else ""


def _tidy(text: str) -> str:
    """UniIR's cleanup: no carriage returns, outer spaces or quotes; a capital first letter; closing punctuation."""
    text = text.replace("\r", "").strip().strip('"')
    if not text:
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".?!" else text + "."
