"""What a source holds: its kind, and the files that make it up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from umarvel_ray.errors import UserError
from umarvel_ray.importing.columns import (
    KINDS,
    PICTURE_SUFFIXES,
    ROW_KINDS,
    SIDECARS,
    WEBDATASET,
    kind_of,
    makes,
    unused,
    use_of,
)
from umarvel_ray.importing.json_captions import holds_captions
from umarvel_ray.importing.record import Fault
from umarvel_ray.importing.tables import PEEKED, SUFFIXES, columns_of, rows_of, suffix_of
from umarvel_ray.importing.text import read_text
from umarvel_ray.importing.walk import files_below
from umarvel_ray.items.item import readable

JSON = ".json"
SIDECAR_SUFFIXES = (".txt", ".caption", JSON)  # in the order in which they are tried
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PACKED = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), "a spreadsheet; save it as CSV"),
    **dict.fromkeys((".zip", ".rar", ".7z"), "packed; unpack it and import the folder"),
    ".gz": "packed; unpack it",
}
LISTED = 10  # names in a note
SAVED, SAVED_SPLITS, METADATA = "state.json", "dataset_dict.json", "metadata"


@dataclass(frozen=True)
class Source:
    """A source whose kind is known.

    Attributes:
        root: the folder that paths are relative to.
        files: tables, tar files, or pictures.
        use: in words, what is taken from which column; "" where nothing had to be guessed.
        notes: lines that say what is not used.
        caption: the key of captions in a picture's JSON; None to find out.
    """

    kind: str
    root: Path
    files: tuple[Path, ...]
    use: str = ""
    notes: tuple[str, ...] = ()
    caption: str | None = None


def detect(path: Path, kind: str | None = None, caption: str | None = None) -> Source:
    """Find out what a file or folder holds.

    Args:
        kind: what the user says it is.
        caption: the key of captions in a picture's JSON, if the user says it.

    Raises:
        UserError: nothing is there, or nothing that is known; two tables of different kinds; see `columns_of`; a
            `caption` of a table.
    """
    source = _detect(path, kind, caption)
    if caption and source.kind in ROW_KINDS:
        raise UserError(f"--caption {caption}: is for the JSON of each picture; name the table's column 'caption'")
    return source


def _detect(path: Path, kind: str | None, caption: str | None) -> Source:
    if kind not in (None, *KINDS):
        raise UserError(f"no kind '{kind}'; choose one of: {', '.join(KINDS)}")
    if not path.exists():
        raise UserError(f"{path}: not found; give a folder or a file")
    root = path if path.is_dir() else path.parent
    files = [file for file in files_below(path) if _is_visible(file, path)] if path.is_dir() else [path]
    tars = [file for file in files if file.name.lower().endswith(TAR_SUFFIXES)]
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    captioned = any(_has_caption(picture, caption) for picture in islice(pictures, PEEKED))
    tables = _tables(path, files)
    if not tables and not (kind is None and captioned):  # each picture may have a JSON file too, which is no table
        tables = [file for file in files if suffix_of(file) == ".json" and file.parent == root]
    if kind in ROW_KINDS:
        return _of_tables(_some(tables, path, "tables (CSV, JSON Lines, Parquet)"), root, kind)
    if kind is None and tables and not _some_fit(tables):  # those at the top may be about the data
        below = [file for file in files if suffix_of(file) in SUFFIXES and suffix_of(file) != ".json"]
        tables = below if _some_fit(below) else tables
    other_kind = kind is not None or bool(tars) or captioned
    if kind is None and tables and (not other_kind or _some_fit(tables)):
        return _of_tables(tables, root, None, tars)
    if kind == WEBDATASET or (kind is None and tars):
        return Source(WEBDATASET, root, _some(tars, path, "tar files"), "", _not_read(tables, root), caption)
    if kind is None and not captioned:
        packed = next((file for file in files if file.suffix.lower() in PACKED), None)
        if packed:
            raise UserError(f"{packed}: {PACKED[packed.suffix.lower()]}")
        raise UserError(
            f"{path}: nothing to import; captions of pictures stand in a CSV with the columns file and caption, or in "
            f"NAME.txt beside NAME.jpg; other sources are tables and tar files (docs/your-data.md)"
        )
    alone = _alone([file for file in files if file.suffix.lower() in SIDECAR_SUFFIXES], pictures)
    notes = _not_read(list(dict.fromkeys([*tables, *alone])), root)
    return Source(SIDECARS, root, _some(pictures, path, "pictures"), "", notes, caption)


def sidecar_of(picture: Path) -> Path | None:
    """The file beside a picture that has its name: `NAME.txt`, `NAME.TXT`, `NAME.png.txt`, `NAME.json` …"""
    ends = [end for suffix in SIDECAR_SUFFIXES for end in (suffix, suffix.upper())]
    beside = [picture.with_suffix(end) for end in ends] + [picture.with_name(picture.name + end) for end in ends]
    return next((file for file in beside if file.is_file()), None)


def is_json(file: Path) -> bool:
    """Whether a file beside a picture is JSON."""
    return file.suffix.lower() == JSON


def _has_caption(picture: Path, caption: str | None) -> bool:
    """Whether a caption is beside a picture; JSON may hold other things."""
    beside = sidecar_of(picture)
    try:
        return beside is not None and (not is_json(beside) or holds_captions(read_text(beside)[0], caption))
    except OSError:
        return False


def _alone(beside: Sequence[Path], pictures: Sequence[Path]) -> list[Path]:
    """The text and JSON files that belong to no picture."""
    names = {name for picture in pictures for name in (picture, picture.with_suffix(""))}
    return [file for file in beside if file.with_suffix("") not in names]


def _tables(path: Path, files: list[Path]) -> list[Path]:
    """Tables but for JSON: what `datasets` saved, else `imagefolder`'s metadata, else those at the top, else all."""
    if saved := _saved(path):
        return saved
    tables = [file for file in files if suffix_of(file) in SUFFIXES and suffix_of(file) != ".json"]
    metadata = [file for file in tables if file.name.partition(".")[0] == METADATA]
    return metadata or [file for file in tables if file.parent == path] or tables


def _saved(folder: Path) -> list[Path]:
    """The Arrow files that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote; none if it is neither."""
    try:
        if (listed := folder / SAVED_SPLITS).is_file():
            return [file for split in json.loads(listed.read_text())["splits"] for file in _saved(folder / split)]
        if (listed := folder / SAVED).is_file():
            files = [folder / entry["filename"] for entry in json.loads(listed.read_text())["_data_files"]]
            if lost := [file for file in files if not file.is_file()]:
                raise UserError(f"{lost[0]}: not found, though {listed} names it; copy the folder again")
            return files
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{listed}: not as `datasets` saves it; save the dataset again") from None
    return []


def _some_fit(tables: Sequence[Path]) -> bool:
    return any(kind_of(columns_of(table)) for table in tables)


def _of_tables(tables: Sequence[Path], root: Path, kind: str | None, tars: Sequence[Path] = ()) -> Source:
    """Tables of one kind: the one that was named, or the one that their columns make; others are left out.

    Raises:
        UserError: no table has the columns of a kind; there are two kinds.
    """
    columns = {table: columns_of(table) for table in tables}
    found: dict[str, list[Path]] = {}
    for table, names in columns.items():
        made = kind_of(names) if kind is None else kind if makes(kind, names) else None
        if made:
            found.setdefault(made, []).append(table)
    if not found:
        raise UserError(_why_not(tables[0], columns[tables[0]], kind))
    if len(found) > 1:
        (one, [first, *_]), (other, [second, *_]) = list(found.items())[:2]
        raise UserError(f"{first.name} holds {one}, {second.name} {other}; give one of them as SOURCE")
    [(made, chosen)] = found.items()
    left = list(dict.fromkeys(name for table in chosen for name in unused(made, columns[table])))
    notes = (f"columns not used: {_some_of(left)}",) if left else ()
    others = [*(table for table in tables if table not in chosen), *tars]
    return Source(made, root, tuple(chosen), use_of(made, columns[chosen[0]]), notes + _not_read(others, root))


def _why_not(table: Path, names: list[str], kind: str | None) -> str:
    """Why nothing can be made of a table."""
    if not names:
        number, row = next(rows_of(table), (0, None))
        return f"{table}, row {number}: {row}" if isinstance(row, Fault) else f"{table}: empty; add rows"
    if {"positive_document_ids", "query_id"} <= set(names):
        return f"{table}: names documents of another file; join them into positive_passages first"
    of = f"'{kind}'" if kind else "no kind of data"
    has = "needs other columns than" if kind else "has its columns"
    return f"{table}: {of} {has} ({_some_of(names)}); rename them (docs/your-data.md)"


def _not_read(files: Sequence[Path], root: Path) -> tuple[str, ...]:
    return (f"not read: {_some_of([file.relative_to(root).as_posix() for file in files])}",) if files else ()


def _some_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return readable(", ".join(names[:LISTED]) + more)


def _some(files: Sequence[Path], path: Path, what: str) -> tuple[Path, ...]:
    if not files:
        raise UserError(f"{path}: no {what} there; check SOURCE and --kind")
    return tuple(files)


def _is_visible(file: Path, root: Path) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(root).parts)
