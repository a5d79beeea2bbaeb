"""Read a source row by row, whatever its kind."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from umarvel_ray.errors import UserError
from umarvel_ray.importing.columns import CAPTION, SIDECARS, WEBDATASET, first
from umarvel_ray.importing.detect import PICTURE_SUFFIXES, Source, sidecar_of
from umarvel_ray.importing.record import BadRow, BadTable, Fault, Item, Place, Record, Row
from umarvel_ray.importing.rows import record_of
from umarvel_ray.importing.tables import TEXT_SUFFIXES, rows_of
from umarvel_ray.importing.text import FALLBACK, column_name, encoding_of, read_text

NAMES = ("id", "_id", "query_id", "qid", "docid", "key", "__key__")
CAPTION_PARTS = ("txt", "caption", "text", "json")


def read(source: Source) -> Iterator[Row]:
    """The rows of a source in the order of its files, each with its place; a guessed encoding is printed.

    Raises:
        UserError: a file cannot be read at all; see `rows_of`.
    """
    if source.kind == WEBDATASET:
        return _webdataset(source)
    return _sidecars(source) if source.kind == SIDECARS else _tables(source)


class Folder:
    """Finds pictures by the paths that tables name them by."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def locate(self, table: Path, written: str) -> str | Path:
        """The file relative to the table, to the root, or the only one of this name below the root; else as written."""
        if written.startswith(("data:", "http://", "https://")):
            return written
        plain = written.replace("\\", "/")
        for folder in (table.parent, self.root):
            if os.path.isfile(file := folder / plain):  # of a name that is too long, `Path.is_file` raises
                return file
        return self._by_name.get(Path(plain).name) or Path(written)

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        files = [file for file in self.root.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES]
        count = Counter(file.name for file in files)
        return {file.name: file for file in files if count[file.name] == 1}


def _tables(source: Source) -> Iterator[Row]:
    folder = Folder(source.root)
    for table in source.files:
        name = table.relative_to(source.root).as_posix()
        if table.suffix.lower() in TEXT_SUFFIXES and encoding_of(table) == FALLBACK:
            print(f"{name}: not UTF-8, read as {FALLBACK}")
        for number, row in rows_of(table):
            if isinstance(row, Fault):
                yield Row(Place(name, number), row)
                continue
            key = first(row, NAMES)
            place = Place(name, number, str(row[key]) if key and row[key] is not None else "")
            try:
                yield Row(place, record_of(source.kind, row, partial(folder.locate, table)))
            except BadTable as error:
                raise UserError(f"{table}, row {number}: {error}") from None
            except BadRow as error:
                yield Row(place, error.fault)


def _sidecars(source: Source) -> Iterator[Row]:
    guessed = 0
    for number, picture in enumerate(source.files, 1):
        place = Place(picture.relative_to(source.root).as_posix(), number)
        text = sidecar_of(picture)
        if text is None:
            yield Row(place, Fault("no caption", f"{picture.stem}.txt is missing"))
            continue
        try:
            said, encoding = read_text(text)
        except OSError as error:
            yield Row(place, Fault("unreadable text file", str(error.strerror)))
            continue
        guessed += encoding == FALLBACK
        shown = Item(pictures=(picture,), name=place.file)
        yield Row(place, Record((Item(said),), (shown,), both_ways=True))
    if guessed:
        print(f"{guessed:,} text files: not UTF-8, read as {FALLBACK}")


def _webdataset(source: Source) -> Iterator[Row]:
    for file in source.files:
        name, number = file.relative_to(source.root).as_posix(), 0
        try:
            for number, (key, parts) in enumerate(_samples(file), 1):
                yield Row(Place(name, number, key), _sample(key, parts))
        except (tarfile.TarError, EOFError, OSError) as error:
            yield Row(Place(name, number + 1), Fault("tar file ends early or is damaged", str(error)))


def _samples(file: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Consecutive members with the same name up to the first dot, by what follows it."""
    current: tuple[str, dict[str, bytes]] | None = None
    with tarfile.open(file, "r|*") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            content = archive.extractfile(member) if member.isfile() else None
            folder, slash, name = member.name.rpartition("/")
            stem, _, part = name.partition(".")
            if content is None or not stem:
                continue
            key = folder + slash + stem
            if current and current[0] != key:
                yield current
                current = None
            current = current or (key, {})
            current[1][part.lower()] = content.read()
    if current:
        yield current


def _sample(key: str, parts: dict[str, bytes]) -> Record | Fault:
    shown = next((part for part in parts if f".{part}" in PICTURE_SUFFIXES), None)
    said = first(parts, CAPTION_PARTS)
    if shown is None or said is None:
        return Fault("no picture" if shown is None else "no caption", f"parts {', '.join(parts)}")
    try:
        captions = _captions(parts[said], said)
    except ValueError as error:
        return Fault("not valid JSON", str(error))
    if not captions:
        return Fault("no caption", f"{said}: none of {', '.join(CAPTION)}")
    return Record(captions, (Item(pictures=(parts[shown],), name=f"{key}.{shown}"),), both_ways=True)


def _captions(content: bytes, part: str) -> tuple[Item, ...]:
    """Raises: ValueError: it is not JSON."""
    if part != "json":
        return (Item(content.decode("utf-8-sig", "replace")),)
    value: Any = json.loads(content)
    if isinstance(value, dict):
        value = {column_name(name): found for name, found in value.items()}
        value = value[name] if (name := first(value, CAPTION)) else None
    values = value if isinstance(value, list) else [value]
    return tuple(Item(text) for text in values if isinstance(text, str))
