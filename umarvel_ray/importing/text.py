"""Text files of unknown encoding, and CSV of an unknown dialect."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Collection, Sequence
from pathlib import Path

FALLBACK = "cp1252"
BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it starts with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DELIMITERS = (",", "\t", ";", "|")
CHUNK = 1 << 20


def encoding_of(path: Path) -> str:
    """What its byte order mark says, UTF-8 if all of it is valid, and FALLBACK otherwise.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(4)
        for mark, name in BOMS.items():
            if head.startswith(mark):
                return name
        decoder = codecs.getincrementaldecoder("utf-8")()
        file.seek(0)
        try:
            while chunk := file.read(CHUNK):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return FALLBACK
    return "utf-8"


def read_text(path: Path) -> tuple[str, str]:
    """All of a small text file, and its encoding. Raises: see `encoding_of`."""
    encoding = encoding_of(path)
    return path.read_text(encoding=encoding, errors="replace"), encoding


def delimiter_of(header: str, known: Collection[str]) -> str:
    """The delimiter that makes the most known column names of a header line; among equals, the most columns."""

    def columns(delimiter: str) -> tuple[int, int]:
        names: Sequence[str] = next(csv.reader([header], delimiter=delimiter), [])
        return sum(column_name(name) in known for name in names), len(names)

    return max(DELIMITERS, key=columns)


def column_name(name: str) -> str:
    """A column's name in one spelling: `Image Path` and `image-path` are `image_path`."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")
