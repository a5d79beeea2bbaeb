"""The numbered names in the folder of a live index. Whatever else lies there, such as a copy, is left alone."""

from __future__ import annotations

import os
import re
from pathlib import Path


def numbered(kind: str, number: int) -> str:
    """The name of a log file or a snapshot."""
    return f"{kind}-{number:012d}"


def numbers(folder: Path, kind: str) -> list[int]:
    """The numbers of the log files or snapshots in a folder, ascending."""
    found = (re.fullmatch(rf"{kind}-([0-9]{{12,}})", name) for name in os.listdir(folder))
    return sorted(int(match[1]) for match in found if match and match[0] == numbered(kind, int(match[1])))
