"""Read a source row by row, whatever its kind."""

from __future__ import annotations

import os
import tarfile
import unicodedata
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import unquote

from umarvel_ray.errors import UserError
from umarvel_ray.importing.columns import NAMES, PICTURE_SUFFIXES, SIDECARS, WEBDATASET, first
from umarvel_ray.importing.detect import Source, is_json, sidecar_of
from umarvel_ray.importing.json_captions import captions_in, names_of
from umarvel_ray.importing.record import BadRow, BadTable, Fault, Item, Place, Record, Row
from umarvel_ray.importing.rows import record_of
from umarvel_ray.importing.tables import TEXT_SUFFIXES, rows_of, suffix_of
from umarvel_ray.importing.tars import CAPTION_PARTS, Parts, is_picture, samples
from umarvel_ray.importing.text import FALLBACK, encoding_of, read_text
from umarvel_ray.importing.walk import files_below


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
        """The file relative to the table, to the root, or the only one of this path or name below it; else as written.

        Case, and how accents are composed, make no difference where only one file is meant.
        """
        if written.startswith(("data:", "http://", "https://")):
            return written
        plain = unquote(written[7:]) if written.startswith("file://") else written.replace("\\", "/")
        places = [folder / plain for folder in (table.parent, self.root)]
        for file in places:
            if os.path.isfile(file):  # of a name that is too long, `Path.is_file` raises
                return file
        keys = [*(_alike(os.path.relpath(file, self.root)) for file in places), Path(plain).name]
        found = (self._only.get(key) for key in (*keys, _alike(Path(plain).name)))
        return next(filter(None, found), Path(written))

    @cached_property
    def _only(self) -> dict[str, Path]:
        """Pictures by each of their names that no other picture has."""
        named: dict[str, set[Path]] = {}
        for file in files_below(self.root):
            if file.suffix.lower() in PICTURE_SUFFIXES:
                for name in (file.name, _alike(file.name), _alike(os.path.relpath(file, self.root))):
                    named.setdefault(name, set()).add(file)
        return {name: files.pop() for name, files in named.items() if len(files) == 1}


def _alike(name: str) -> str:
    """The same for names that differ in case, or in how accents are composed, as macOS stores them."""
    return unicodedata.normalize("NFC", name).casefold()


def _tables(source: Source) -> Iterator[Row]:
    folder = Folder(source.root)
    for table in source.files:
        name = table.relative_to(source.root).as_posix()
        if suffix_of(table) in TEXT_SUFFIXES and encoding_of(table) == FALLBACK:
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
            captions = captions_in(said, source.caption, names_of(picture.name)) if is_json(text) else [said]
        except OSError as error:
            yield Row(place, Fault("unreadable text file", str(error.strerror)))
            continue
        except BadTable as error:
            raise UserError(f"{text}: {error.fault}") from None
        except BadRow as error:
            yield Row(place, error.fault)
            continue
        guessed += encoding == FALLBACK
        shown = Item(pictures=(picture,), name=place.file)
        yield Row(place, Record(tuple(map(Item, captions)), (shown,), both_ways=True))
    if guessed:
        print(f"{guessed:,} text files: not UTF-8, read as {FALLBACK}")


def _webdataset(source: Source) -> Iterator[Row]:
    for file in source.files:
        name, number = file.relative_to(source.root).as_posix(), 0
        try:
            for number, (key, parts) in enumerate(samples(file), 1):
                place = Place(name, number, key)
                try:
                    yield Row(place, parts if isinstance(parts, Fault) else _sample(key, parts, source.caption))
                except BadTable as error:
                    raise UserError(f"{file}, {key}: {error.fault}") from None
                except BadRow as error:
                    yield Row(place, error.fault)
        except (tarfile.TarError, EOFError, OSError) as error:
            yield Row(Place(name, number + 1), Fault("tar file ends early or is damaged", str(error)))


def _sample(key: str, parts: Parts, caption: str | None) -> Record:
    shown = next(filter(is_picture, parts), None)
    said = first(parts, CAPTION_PARTS)
    if shown is None or said is None:
        raise BadRow("no picture" if shown is None else "no caption", f"parts {', '.join(parts)}")
    name = f"{key}.{shown}"
    captions = [parts[said].decode("utf-8-sig", "replace")]
    if said == "json":
        captions = captions_in(parts[said], caption, names_of(name))
    texts = tuple(map(Item, captions))
    return Record(texts, (Item(pictures=(parts[shown],), name=name),), both_ways=True)
