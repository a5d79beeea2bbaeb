"""Token ids: of templates, whose control tokens are structure, and of users' texts, which never hold any.

A conversation is a list of pieces. Control tokens are ids from the start. Everything else is text, which is tokenized
without knowing of them, so that no user's text can end a turn or pose as a picture, whatever its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

Piece = str | int  # text, or the id of a control token


class Tokens:
    """A checkpoint's tokenizer, for pieces. Picklable.

    Attributes:
        controls: the id of each control token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.controls: dict[str, int] = tokenizer.get_added_vocab()
        longest_first = sorted(self.controls, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)))
        self._plain = _without_control_tokens(tokenizer.backend_tokenizer)
        # A vocabulary may hold its control tokens as words too; an unknown character is no structure.
        self._unwanted = set(self.controls.values()) - {tokenizer.unk_token_id}

    def __reduce__(self) -> tuple[type[Tokens], tuple[PreTrainedTokenizerBase]]:
        return Tokens, (self._tokenizer,)

    def pieces(self, rendered: str) -> list[Piece]:
        """A template's own text in pieces."""
        found: list[Piece] = []
        end = 0
        for match in self._spelled.finditer(rendered):
            found += [rendered[end : match.start()], self.controls[match[0]]]
            end = match.end()
        return [piece for piece in [*found, rendered[end:]] if piece != ""]

    def ids(self, pieces: Iterable[Piece]) -> list[int]:
        """Token ids; strings that follow one another are tokenized as one."""
        ids: list[int] = []
        for is_text, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            run = list(group)
            ids += self.text_ids("".join(map(str, run))) if is_text else map(int, run)
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text, none of them a control token."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids if self._unwanted.isdisjoint(ids) else [one for one in ids if one not in self._unwanted]

    def without_controls(self, text: str) -> str:
        """The text with a space for each control token that it spells out."""
        # The cleaning of texts removes carriage returns (docs/method.md#text-cleaning), which would join halves.
        return self._spelled.sub(" ", text.replace("\r", ""))

    def is_below(self, text: str, tokens: int) -> bool:
        """Whether a text has fewer than `tokens` tokens."""
        return len(text.encode()) < tokens or len(self.text_ids(text)) < tokens  # a token is at least one byte

    def cut(self, text: str, tokens: int) -> str:
        """The longest prefix of `text` that fits in `tokens` tokens."""
        if len(text.encode()) <= tokens:
            return text
        ids = self.text_ids(text)
        if len(ids) <= tokens:
            return text
        prefix = str(self._tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False))
        return prefix.rstrip("\ufffd")  # of a character cut in half


def _without_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    plain = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    return plain
