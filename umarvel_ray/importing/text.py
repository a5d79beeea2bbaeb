"""Text files of unknown encoding, and CSV of an unknown dialect."""

from __future__ import annotations

import codecs
import csv
import gzip
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, cast

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
SAMPLE = 4096
MOSTLY = 4  # one byte in so many, or more


def open_binary(path: Path) -> IO[bytes]:
    """A file's bytes, unpacked if its name ends in `.gz`. Raises: OSError, EOFError, zlib.error: it cannot be read."""
    if path.name.lower().endswith(".gz"):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    return path.open("rb")


def encoding_of(path: Path) -> str:
    """What its byte order mark says; UTF-16 if it has the zeros of that; UTF-8 if all of it is valid; else FALLBACK.

    Raises: see `open_binary`.
    """
    with open_binary(path) as file:
        head = file.read(SAMPLE)
        for mark, name in BOMS.items():
            if head.startswith(mark):
                return name
        zeros = [head[start::2].count(0) * MOSTLY > len(head) // 2 for start in (0, 1)]
        if zeros[0] != zeros[1]:  # of letters, digits and delimiters the other byte is never zero
            return "utf-16-be" if zeros[0] else "utf-16-le"
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
