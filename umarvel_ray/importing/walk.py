"""Every file below a folder."""

from __future__ import annotations

import os
from pathlib import Path


def files_below(folder: Path) -> list[Path]:
    """The files below a folder, sorted. Linked folders are entered; each folder is entered once, so that loops end."""
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders.sort()
        found += [Path(where) / name for name in names]
    return sorted(file for file in found if file.is_file())
