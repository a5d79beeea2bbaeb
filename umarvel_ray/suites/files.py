"""Read a benchmark's annotation files; one that cannot be read is an error of one line."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from umarvel_ray.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".gif", ".webp")


def read_json(path: Path) -> Any:
    """The contents of a JSON file."""
    with _readable(path, "JSON"):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def read_jsonl(path: Path) -> list[Any]:
    """The contents of the lines of a JSON Lines file."""
    with _readable(path, "JSON lines"):
        return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    with _readable(path, "CSV"), path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, stripped."""
    with _readable(path, "UTF-8 text"):
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def read_pickle(path: Path) -> Any:
    """The contents of a pickle of plain Python values; anything else in it is refused, because it could run code."""
    with _readable(path, "a pickle of plain values"), path.open("rb") as file:
        return _PlainUnpickler(file, encoding="utf-8").load()


def pictures_in(root: Path, folder: str) -> dict[str, str]:
    """Pictures of a folder by name without suffix: paths relative to `root`, in order of their names."""
    files = sorted(path for path in (root / folder).iterdir() if path.suffix.lower() in PICTURES)
    return {path.stem: str(path.relative_to(root)) for path in files}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, csv.Error, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: not {what} ({' '.join(str(error).split())}); get the file again") from None
