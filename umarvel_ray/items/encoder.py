"""From an item to token ids, pooling mask and pixels: U-MARVEL's message template (docs/method.md#item-template).

Queries and documents share one template: a user turn with the pictures, then the text, and the assistant turn
`<emb>.`, rendered with the checkpoint's own chat template. A query's instruction precedes its text, wrapped in
`<instruction_start>…<instruction_end>`; the span, including both tags, is left out of the pooled mean.

Settings with a `message` render another system's instead (docs/guide.md#presets).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from umarvel_ray.errors import UserError
from umarvel_ray.items.family import Family, family_of, read_model_config
from umarvel_ray.items.item import Item, check_item
from umarvel_ray.items.limits import OWN_FILES, MediaLimits
from umarvel_ray.items.pictures import Picture, PictureFormat, read_pictures
from umarvel_ray.items.positions import Span, rotary_positions
from umarvel_ray.items.template import (
    EMB,
    IMAGE,
    INSTRUCTION_END,
    INSTRUCTION_START,
    VIDEO,
    VISION_END,
    VISION_START,
    format_string,
    load_tokenizer,
    render,
    text_part,
    user_turn,
)
from umarvel_ray.items.tokens import Piece, Tokens
from umarvel_ray.items.wording import Filler, kinds, words_of
from umarvel_ray.recipe import ModelSettings
from umarvel_ray.wording import Message

TEXT_SLOT = "\x00"
TAGS = (INSTRUCTION_START, INSTRUCTION_END)


@dataclass(frozen=True)
class EncodedItem:
    """One tokenized item of L tokens.

    Attributes:
        input_ids: int32 (L,).
        pool_mask: bool (L,), True for tokens that enter the pooled mean.
        positions: int32 (3, L), rotary positions.
        pictures: in the order of their tokens, images before the video.
    """

    input_ids: np.ndarray
    pool_mask: np.ndarray
    positions: np.ndarray
    pictures: tuple[Picture, ...]

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def nbytes(self) -> int:
        arrays = (self.input_ids, self.pool_mask, self.positions, *(picture.pixels for picture in self.pictures))
        return sum(array.nbytes for array in arrays)


class ItemEncoder:
    """Tokenizes items and prepares their pictures on the CPU. Picklable; holds no weights."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, pictures: PictureFormat, family: Family, settings: ModelSettings
    ) -> None:
        self.tokenizer = tokenizer
        self.picture_format = pictures
        self.settings = settings
        self.family = family
        self.tokens = Tokens(tokenizer)
        controls = self.tokens.controls
        self.picture_token_ids = self._image, self._video = controls[IMAGE], controls[VIDEO]
        self._emb, self._start, self._end = (controls[token] for token in (EMB, *TAGS))
        self._frames: dict[tuple[bool, ...], tuple[list[Piece], list[Piece]]] = {}
        if message := settings.message:
            self._fill = Filler(message.text, message, self.pieces)
            self._suffix = self.tokens.ids(self.pieces(message.suffix))

    @classmethod
    def from_pretrained(cls, path: str | Path, settings: ModelSettings, limits: MediaLimits = OWN_FILES) -> ItemEncoder:
        """Read the tokenizer, chat template and image processor of a Hugging Face directory.

        Args:
            limits: which pictures and videos may be opened.

        Raises:
            UserError: one of them is missing or unreadable.
        """
        try:
            tokenizer = load_tokenizer(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: tokenizer cannot be read ({str(error).splitlines()[0]})") from None
        known = tokenizer.get_added_vocab()
        if missing := [token for token in (IMAGE, VIDEO, VISION_START, VISION_END) if token not in known]:
            raise UserError(f"{path}: its tokenizer has no {missing[0]}; take the one of the base model")
        family = family_of(read_model_config(path), path)
        return cls(tokenizer, PictureFormat.from_pretrained(path, settings, limits), family, settings)

    def within(self, limits: MediaLimits) -> ItemEncoder:
        """A copy of this encoder with other limits on the pictures and videos it opens."""
        return ItemEncoder(self.tokenizer, replace(self.picture_format, limits=limits), self.family, self.settings)

    def encode(
        self, item: Item | str, side: str, where: str = "item", pictures: tuple[Picture, ...] | None = None
    ) -> EncodedItem:
        """Encode one item; a bare string is text.

        Args:
            item: {"text"?, "image"? (one or a list), "video"?, "instruction"? (of queries; of documents where
                `takes_document_instructions`)}.
            side: "query" or "document".
            where: names the item (file and row, or id) in errors.
            pictures: the item's, if they have been read already.

        Raises:
            UserError: nothing to embed, an unknown key, a bad picture or video, an instruction on a document, or one so
                long that the text would not be read; pictures that do not fit in the tokens of a `Message`.
        """
        item = check_item(item, where)
        if side == "document" and item.get("instruction") and not self.takes_document_instructions:
            raise UserError(f"{where}: a document carries no instruction; put it on the query")
        require_room(item, where, self.leaves_room, self.settings.max_text_tokens)
        pictures = self.pictures(item, where) if pictures is None else pictures
        if message := self.settings.message:
            input_ids = self._written(message, item, side, pictures, where)
        else:
            text = self._text(item.get("instruction"), item.get("text"))
            before, after = self._frame(pictures)
            input_ids = self.tokenize([*before, *text, self._prompt(item, pictures), *after], pictures)
        return EncodedItem(
            input_ids=input_ids,
            pool_mask=self._pool_mask(input_ids),
            positions=self.positions(input_ids, pictures),
            pictures=pictures,
        )

    @property
    def takes_document_instructions(self) -> bool:
        """Whether documents may have instructions too."""
        return self.settings.message is not None and self.settings.message.document_instructions

    def pictures(self, item: Item, where: str) -> tuple[Picture, ...]:
        """Open, resize and patchify the item's images, then its video."""
        return read_pictures(item, self.picture_format, where)

    def pieces(self, rendered: str) -> list[Piece]:
        """A rendered template in pieces, with one picture token for each picture."""
        if self.family.timestamps:  # each frame group is wrapped in tags of its own
            rendered = rendered.replace(f"{VISION_START}{VIDEO}{VISION_END}", VIDEO)
        return self.tokens.pieces(rendered)

    def tokenize(self, pieces: Sequence[Piece], pictures: Sequence[Picture]) -> np.ndarray:
        """Token ids, int32 (L,), of a conversation; each picture's token becomes its run of tokens."""
        runs = iter([self._run(picture) for picture in pictures])
        expanded = [part for piece in pieces for part in (next(runs) if piece in self.picture_token_ids else [piece])]
        return np.asarray(self.tokens.ids(expanded), dtype=np.int32)

    def positions(self, input_ids: np.ndarray, pictures: Sequence[Picture]) -> np.ndarray:
        """Rotary positions, int32 (3, L), as `ModelSettings.positions` says."""
        spans = [span for picture in pictures for span in self._spans(picture)]
        return rotary_positions(np.isin(input_ids, self.picture_token_ids), spans, self.settings.positions)

    def _run(self, picture: Picture) -> Sequence[Piece]:
        groups, rows, columns = picture.grid
        run = rows * columns // self.picture_format.merge_size**2
        if picture.seconds is None:
            return [self._image] * run
        if not self.family.timestamps:
            return [self._video] * groups * run
        start, end = (self.tokens.controls[tag] for tag in (VISION_START, VISION_END))
        pieces: list[Piece] = []
        for second in picture.seconds:
            pieces += [f"<{second:.1f} seconds>", start, *[self._video] * run, end]
        return pieces

    def _spans(self, picture: Picture) -> list[Span]:
        groups, rows, columns = picture.grid
        merge = self.picture_format.merge_size
        if picture.is_video and self.family.timestamps:
            return [Span((1, rows // merge, columns // merge))] * groups
        interval = 1.0
        if self.family.tokens_per_second and picture.seconds and groups > 1:
            interval = self.family.tokens_per_second * (picture.seconds[1] - picture.seconds[0])
        return [Span((groups, rows // merge, columns // merge), interval)]

    def clean(self, text: str | None) -> str:
        """The text without control tokens, normalized by `format_string`."""
        return format_string(self.tokens.without_controls(text or ""))

    def leaves_room(self, instruction: str) -> bool:
        """Whether a text after this instruction is read at least in part; a `Message` is cut without a word."""
        return bool(self.settings.message) or self.tokens.is_below(
            self.clean(instruction), self.settings.max_text_tokens - len(TAGS)
        )

    def _frame(self, pictures: Sequence[Picture]) -> tuple[list[Piece], list[Piece]]:
        """The conversation before and after the user's text; cached, since rendering dominates encoding."""
        moving = tuple(picture.is_video for picture in pictures)
        if moving not in self._frames:
            messages = [user_turn(TEXT_SLOT, pictures), {"role": "assistant", "content": [text_part(f"{EMB}.")]}]
            rendered = render(self.tokenizer, messages, self.settings.generation_prompt)
            before, _, after = rendered.partition(TEXT_SLOT)
            self._frames[moving] = self.pieces(before), self.pieces(after)
        return self._frames[moving]

    def _text(self, instruction: str | None, text: str | None) -> list[Piece]:
        limit = self.settings.max_text_tokens
        if not instruction:
            return [self.tokens.cut(self.clean(text), limit)]
        instruction = self.tokens.cut(self.clean(instruction), max(limit - len(TAGS), 0))
        # Normalized as one string (docs/method.md#text-cleaning): the text keeps the case of its first letter, and an
        # empty text leaves a period.
        opened = f"{INSTRUCTION_START}{instruction}{INSTRUCTION_END}" if self.settings.instruction_mask else instruction
        whole = format_string(f"{opened} {self.tokens.without_controls(text or '')}")
        if not self.settings.instruction_mask:
            return [self.tokens.cut(whole, limit)]
        left = limit - len(TAGS) - len(self.tokens.text_ids(instruction))
        return [self._start, instruction, self._end, self.tokens.cut(whole.removeprefix(opened), max(left, 0))]

    def _prompt(self, item: Item, pictures: Sequence[Picture]) -> str:
        if not self.settings.compression_prompt:
            return ""
        return f"\nSummarize above {kinds(pictures, bool(item.keys() & {'text', 'instruction'}))} in one word: "

    def _written(self, message: Message, item: Item, side: str, pictures: Sequence[Picture], where: str) -> np.ndarray:
        """Token ids of a message of another system, cut as its code does."""
        default, limit = message.instruction, message.max_query_tokens
        if side == "document":
            of_picture = message.described_document if "text" in item else message.picture_document
            default = (of_picture if pictures else "") or default
            limit = message.max_document_tokens
        words = words_of(item, side, message, default, self.clean)
        whole = self.tokenize(self._fill(words, pictures), pictures)
        kept = whole if limit is None else whole[: max(limit - len(self._suffix), 0)]
        if np.isin(whole[len(kept) :], self.picture_token_ids).any():
            raise UserError(f"{where}: its pictures do not fit in the {limit} tokens of a {side}; give fewer")
        return np.asarray([*kept, *self._suffix], dtype=np.int32)

    def _pool_mask(self, input_ids: np.ndarray) -> np.ndarray:
        if self.settings.pooling == "end" or (self.settings.pooling == "last" and self._emb not in input_ids):
            return np.asarray(np.arange(len(input_ids)) == len(input_ids) - 1)
        if self.settings.pooling == "last":
            return np.roll(input_ids == self._emb, -1)
        opened = np.cumsum(input_ids == self._start)
        closed = np.cumsum(input_ids == self._end) - (input_ids == self._end)  # the end tag is inside the span
        return np.asarray(opened == closed)


def require_room(item: Item, where: str, leaves_room: Callable[[str], bool], max_text_tokens: int) -> None:
    """Refuse an item whose text would not be read.

    Args:
        leaves_room: the encoder's, for an instruction.
        max_text_tokens: of instruction and text together.

    Raises:
        UserError: the instruction is too long.
    """
    instruction = item.get("instruction")
    if instruction and "text" in item and not leaves_room(instruction):
        raise UserError(
            f"{where}: the instruction leaves no room for a text within max_text_tokens ({max_text_tokens}); shorten it"
        )
