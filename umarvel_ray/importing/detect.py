"""What a source holds: its kind, and the files that make it up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from umarvel_ray.errors import UserError
from umarvel_ray.importing.columns import KINDS, ROW_KINDS, SIDECARS, WEBDATASET, kind_of, use_of
from umarvel_ray.importing.tables import PEEKED, SUFFIXES, columns_of

PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm",
)  # fmt: skip
SIDECAR_SUFFIXES = (".txt", ".caption")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SAVED, SAVED_SPLITS, METADATA = "state.json", "dataset_dict.json", "metadata"


@dataclass(frozen=True)
class Source:
    """A source whose kind is known.

    Attributes:
        root: the folder that paths are relative to.
        files: tables, tar files, or pictures.
        use: in words, what is taken from which column; "" where nothing had to be guessed.
    """

    kind: str
    root: Path
    files: tuple[Path, ...]
    use: str = ""


def detect(path: Path, kind: str | None = None) -> Source:
    """Find out what a file or folder holds.

    Args:
        kind: what the user says it is.

    Raises:
        UserError: nothing is there, or nothing that is known; two tables of different kinds.
    """
    if kind not in (None, *KINDS):
        raise UserError(f"no kind '{kind}'; choose one of: {', '.join(KINDS)}")
    if not path.exists():
        raise UserError(f"{path}: not found; give a folder or a file")
    root = path if path.is_dir() else path.parent
    files = sorted(file for file in path.rglob("*") if _is_visible(file, path)) if path.is_dir() else [path]
    tars = [file for file in files if file.name.lower().endswith(TAR_SUFFIXES)]
    if kind == WEBDATASET or (kind is None and tars):
        return Source(WEBDATASET, root, _some(tars, path, "tar files"))
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    captioned = any(sidecar_of(picture) for picture in islice(pictures, PEEKED))
    tables = _tables(path, files)
    if not tables and not (kind is None and captioned):  # each picture may have a JSON file too, which is no table
        tables = [file for file in files if file.suffix.lower() == ".json" and file.parent == root]
    if kind in ROW_KINDS or (kind is None and tables):
        return _of_tables(_some(tables, path, "tables (CSV, JSON Lines, Parquet)"), root, kind)
    if kind is None and not captioned:
        raise UserError(
            f"{path}: nothing to import; captions of pictures stand in a CSV with the columns file and caption, or in "
            f"NAME.txt beside NAME.jpg; other sources are tables and tar files (docs/your-data.md)"
        )
    return Source(SIDECARS, root, _some(pictures, path, "pictures"))


def sidecar_of(picture: Path) -> Path | None:
    """The text file beside a picture that has its name."""
    return next((file for end in SIDECAR_SUFFIXES if (file := picture.with_suffix(end)).is_file()), None)


def _tables(path: Path, files: list[Path]) -> list[Path]:
    """Tables but for JSON: what `datasets` saved, else `imagefolder`'s metadata, else those at the top, else all."""
    if saved := _saved(path):
        return saved
    tables = [file for file in files if file.suffix.lower() in SUFFIXES and file.suffix.lower() != ".json"]
    metadata = [file for file in tables if file.stem == METADATA]
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


def _of_tables(tables: tuple[Path, ...], root: Path, kind: str | None) -> Source:
    """Tables of one kind: the one that was named, or the one that their columns make."""
    found: dict[str, tuple[Path, list[str]]] = {}
    for table in tables:
        names = columns_of(table)
        made = kind or kind_of(names)
        if made is None:
            if {"positive_document_ids", "query_id"} <= set(names):
                raise UserError(f"{table}: names documents of another file; join them into positive_passages first")
            columns = ", ".join(names) or "none"
            raise UserError(f"{table}: no kind of data has its columns ({columns}); rename them (docs/your-data.md)")
        found.setdefault(made, (table, names))
    if len(found) > 1:
        (one, (first, _)), (other, (second, _)) = list(found.items())[:2]
        raise UserError(f"{first.name} holds {one}, {second.name} {other}; give one of them as SOURCE")
    [(made, (_, names))] = found.items()
    return Source(made, root, tables, use_of(made, names))


def _some(files: list[Path], path: Path, what: str) -> tuple[Path, ...]:
    if not files:
        raise UserError(f"{path}: no {what} there; check SOURCE and --kind")
    return tuple(files)


def _is_visible(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(root).parts)
