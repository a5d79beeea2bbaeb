"""What a process has allocated (Linux)."""

from __future__ import annotations

from pathlib import Path


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process's own memory, RssAnon, and of its shared memory, RssShmem; zero if it has ended."""
    sizes = {"RssAnon": 0, "RssShmem": 0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return sizes
    entries = (line.partition(":") for line in lines)
    return sizes | {name: int(value.split()[0]) * 1024 for name, _, value in entries if name in sizes}
