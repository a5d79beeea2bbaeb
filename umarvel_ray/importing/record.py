"""What every reader yields: a row of the source as queries with their documents, or the reason why it is of no use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Picture = bytes | str | Path  # encoded bytes, a data URI, or a file


class Item(NamedTuple):
    """A query or a document: text, pictures, or both.

    Attributes:
        name: its id, if it has a name of its own: a picture's path, as it is written in the source.
    """

    text: str = ""
    pictures: tuple[Picture, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Record:
    """Each of the queries asks for each of the positives.

    Attributes:
        instruction: the row's own; None for the default of its task, "" for none.
        both_ways: the positives also ask for the queries, as pictures do for their captions.
    """

    queries: tuple[Item, ...]
    positives: tuple[Item, ...]
    negatives: tuple[Item, ...] = ()
    instruction: str | None = None
    both_ways: bool = False


@dataclass(frozen=True)
class Fault:
    """Why a row, or a part of it, cannot be used: the same reason for the same mistake, and what is particular here."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class BadRow(Exception):
    """Raised while a row is understood; readers turn it into a `Fault`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.fault = Fault(reason, detail)


class BadTable(BadRow):
    """A row shows that its table would be misunderstood; readers turn it into a `UserError`."""


class Place(NamedTuple):
    """Where a row stands.

    Attributes:
        file: relative to the source.
        row: from 1; of a text file, the line, of a tar file, the sample.
        id: the row's own name, if it has one.
    """

    file: str
    row: int
    id: str = ""


class Row(NamedTuple):
    """A row of the source, understood or not."""

    place: Place
    found: Record | Fault
