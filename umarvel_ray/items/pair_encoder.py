"""The reranker's prompt: one user turn with a query and a candidate, answered Yes or No (docs/method.md#reranker).

The wording is the reference's without its stray indentation and its typo (docs/method.md#reranker-prompt). The query
comes first and is tokenized separately from the candidate, so the tokens up to "Candidate:" are the same for every
candidate and are computed once per query. Settings with a `pair` render another system's prompt instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import TEXT_SLOT, ItemEncoder, require_room
from umarvel_ray.items.item import Item, check_item
from umarvel_ray.items.pictures import Picture
from umarvel_ray.items.template import EMB, picture_parts, render, text_part
from umarvel_ray.items.tokens import Piece
from umarvel_ray.items.wording import Filler, words_of
from umarvel_ray.recipe import ModelSettings
from umarvel_ray.wording import PairMessage

TASK = (
    "I will provide you with a query and a candidate. Please evaluate whether the candidate meets the requirements of "
    "the query. If it does, respond with 'Yes'; if it does not, respond with 'No'."
)
IGNORED = -100  # a position without a label
QUERY, DOCUMENT = 0, 1  # the sides of a pair


@dataclass(frozen=True)
class EncodedPair:
    """A tokenized pair of L tokens, or one side of it.

    Attributes:
        input_ids: int32 (L,).
        labels: int32 (L,), −100 except for the answer word and the end of the turn.
        positions: int32 (3, L), rotary positions from 0.
        pictures: the query's, then the document's.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    pictures: tuple[Picture, ...]

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def nbytes(self) -> int:
        arrays = (self.input_ids, self.labels, self.positions, *(picture.pixels for picture in self.pictures))
        return sum(array.nbytes for array in arrays)

    @property
    def next_position(self) -> int:
        """The first position of the part that follows; every side ends in text, where all axes agree."""
        return int(self.positions.max()) + 1


class PairEncoder:
    """Tokenizes (query, document) pairs and prepares their pictures on the CPU. Picklable; holds no weights.

    Attributes:
        answer_ids: the tokens of "Yes" and of "No", or of the words that take their place.
        end_id: the token that ends the assistant's turn.
    """

    def __init__(self, items: ItemEncoder, max_text_tokens: int) -> None:
        self.items = items
        self.max_text_tokens = max_text_tokens
        self._frames: dict[tuple[int, tuple[bool, ...]], tuple[list[Piece], list[Piece]]] = {}
        self._pair = items.settings.pair
        self._closing: list[int] = []
        words = self._pair.answers if self._pair else ("Yes", "No")
        self.answer_ids = {name: self._ids(word) for name, word in zip(("Yes", "No"), words, strict=True)}
        if self._pair:
            self._fill = [Filler(side, self._pair, items.pieces) for side in (self._pair.query, self._pair.document)]
            self._closing = self._fill[DOCUMENT].closing(items.tokens)
            self.end_id = self._closing[0]  # of the user's turn, as of the assistant's
        else:
            turns = {"user": [], "assistant": [text_part(EMB)]}
            rendered = render(items.tokenizer, [{"role": role, "content": parts} for role, parts in turns.items()])
            self.end_id = self._ids(rendered.split(EMB)[1])[0]
        if self.answer_ids["Yes"][0] == self.answer_ids["No"][0]:
            same = " and ".join(f"'{word}'" for word in words)
            raise UserError(f"{same} start with the same token in this tokenizer; use one that separates them")

    @classmethod
    def from_pretrained(cls, path: str | Path, settings: ModelSettings, max_text_tokens: int) -> PairEncoder:
        """Read the tokenizer, chat template and image processor of a Hugging Face directory.

        Args:
            max_text_tokens: limit on a document's text, and on a query's instruction and text together.

        Raises:
            UserError: a file is missing, or "Yes" and "No" start with the same token.
        """
        return cls(ItemEncoder.from_pretrained(path, settings), max_text_tokens)

    @property
    def yes_no(self) -> tuple[int, int]:
        """The first token of each answer; a score compares their two logits."""
        return self.answer_ids["Yes"][0], self.answer_ids["No"][0]

    def encode(
        self, query: Item | str, document: Item | str, answer: bool | None = None, where: str = "pair"
    ) -> EncodedPair:
        """Encode the whole conversation; with `answer`, the reply and its labels too.

        Raises:
            UserError: an empty item, an unknown key, an instruction on the document, a bad picture or video, an
                instruction so long that the query's text would not be read.
        """
        asked = self.encode_query(query, where)
        parts = [asked, self.fitted(self.encode_document(document, where), asked.length)]
        return join(parts if answer is None else [*parts, self.reply(answer)])

    def encode_query(
        self, item: Item | str, where: str = "query", pictures: tuple[Picture, ...] | None = None
    ) -> EncodedPair:
        """Encode everything up to and including "Candidate:". Args, raises: see `encode` and `ItemEncoder.encode`."""
        item = check_item(item, where)
        require_room(item, where, self.leaves_room, self.max_text_tokens)
        pictures = self.items.pictures(item, where) if pictures is None else pictures
        if self._pair:
            return self._written(self._pair, QUERY, item, pictures)
        instruction = self.items.clean(item.get("instruction"))
        return self._side(QUERY, pictures, f"{instruction} {item.get('text') or ''}")

    def encode_document(
        self, item: Item | str, where: str = "document", pictures: tuple[Picture, ...] | None = None
    ) -> EncodedPair:
        """Encode the candidate and the header of the assistant turn. Args, raises: as `encode_query`."""
        item = check_item(item, where)
        if item.get("instruction"):
            raise UserError(f"{where}: a document carries no instruction; put it on the query")
        pictures = self.items.pictures(item, where) if pictures is None else pictures
        if self._pair:
            return self._written(self._pair, DOCUMENT, item, pictures)
        return self._side(DOCUMENT, pictures, item.get("text") or "")

    def leaves_room(self, instruction: str) -> bool:
        """Whether a query's text after this instruction is read at least in part; a `PairMessage` is cut instead."""
        return bool(self._pair) or self.items.tokens.is_below(self.items.clean(instruction), self.max_text_tokens)

    def reply(self, answer: bool) -> EncodedPair:
        """The answer word and the end of the turn, both with labels."""
        ids = np.asarray([*self.answer_ids["Yes" if answer else "No"], self.end_id], dtype=np.int32)
        return EncodedPair(ids, ids, self.items.positions(ids, ()), ())

    def fitted(self, side: EncodedPair, before: int = 0) -> EncodedPair:
        """A side of a `PairMessage` without the plain tokens that exceed its limit; any other side unchanged.

        Control tokens, those of pictures included, and the message's end are kept.

        Args:
            before: the tokens of the query, if this is the document.
        """
        limit = self._pair.max_tokens if self._pair else None
        closing = len(self._closing) if before else 0
        if limit is None or (excess := before + side.length - closing - limit) <= 0:
            return side
        controls = list(self.items.tokens.controls.values())
        plain = np.flatnonzero(~np.isin(side.input_ids[: side.length - closing], controls))
        input_ids = np.delete(side.input_ids, plain[-excess:])
        return self._encoded(input_ids, side.pictures)

    def _written(self, pair: PairMessage, side: int, item: Item, pictures: tuple[Picture, ...]) -> EncodedPair:
        """One side of another system's prompt."""
        words = words_of(item, "query" if side == QUERY else "document", pair, pair.instruction, self.items.clean)
        encoded = self._encoded(self.items.tokenize(self._fill[side](words, pictures), pictures), pictures)
        return self.fitted(encoded) if side == QUERY else encoded

    def _frame(self, side: int, pictures: tuple[Picture, ...]) -> tuple[list[Piece], list[Piece]]:
        """One side of the prompt before and after the user's text; cached, since rendering dominates encoding."""
        key = side, tuple(picture.is_video for picture in pictures)
        if key not in self._frames:
            sides: list[list[dict[str, str]]] = [[], []]
            sides[side] = [*picture_parts(pictures), text_part(TEXT_SLOT)]
            query, document = sides
            # <emb> marks the boundary.
            content = [text_part(f"{TASK}\nQuery: "), *query, text_part(f"\nCandidate: {EMB}"), *document]
            rendered = render(self.items.tokenizer, [{"role": "user", "content": content}], generation_prompt=True)
            before, _, after = rendered.split(EMB)[side].partition(TEXT_SLOT)
            self._frames[key] = self.items.pieces(before), self.items.pieces(after)
        return self._frames[key]

    def _side(self, side: int, pictures: tuple[Picture, ...], text: str) -> EncodedPair:
        before, after = self._frame(side, pictures)
        text = self.items.tokens.cut(self.items.clean(text), self.max_text_tokens)
        return self._encoded(self.items.tokenize([*before, text, *after], pictures), pictures)

    def _encoded(self, input_ids: np.ndarray, pictures: tuple[Picture, ...]) -> EncodedPair:
        positions = self.items.positions(input_ids, pictures)
        return EncodedPair(input_ids, np.full_like(input_ids, IGNORED), positions, pictures)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.items.tokenizer(text, add_special_tokens=False).input_ids
        return ids


def join(parts: Sequence[EncodedPair]) -> EncodedPair:
    """Concatenate query, document and reply; each part's positions continue those of the part before."""
    starts = accumulate((part.next_position for part in parts), initial=0)
    return EncodedPair(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        positions=np.concatenate([part.positions + start for part, start in zip(parts, starts, strict=False)], axis=1),
        pictures=tuple(picture for part in parts for picture in part.pictures),
    )
