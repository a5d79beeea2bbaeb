"""Atomic writes: files and folders that appear whole or not at all."""

from __future__ import annotations

import glob
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ABANDONED_S = 3600.0  # a partial file that was not written to for so long has lost its writer


def user_cache() -> Path:
    """Where files are kept that belong to no run folder: $XDG_CACHE_HOME/umarvel, by default ~/.cache/umarvel."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umarvel"


@contextmanager
def atomic_path(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` when the block ends, and removed if it fails.

    What an attempt that was killed has left is removed an hour later.

    Args:
        durable: flush the file and its name to disk before returning.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        if durable:
            _sync_file(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: str | Path, text: str, durable: bool = False) -> None:
    """Write a UTF-8 text file atomically. Raises: see `atomic_path`."""
    with atomic_path(path, durable) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, indent: int | None = 1, durable: bool = False) -> None:
    """Write a JSON file atomically. Raises: see `atomic_path`."""
    write_text(path, json.dumps(value, indent=indent) + "\n", durable)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; it replaces `folder` when the block ends.

    Leftovers of an interrupted attempt are removed first; an existing `folder` is removed only once the new one is
    complete. One process at a time may write a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    fresh, old = (folder.with_name(f".{folder.name}.{word}") for word in ("writing", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush names created, renamed or removed in the folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove_abandoned(path: Path) -> None:
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > ABANDONED_S:
                partial.unlink()
