"""Logs of the live index for tests: written and read back in one call."""

from pathlib import Path

from umarvel_ray.index.log import LogWriter, Position, read_log


def write(folder: Path, payloads: list[bytes], end: Position | None = None) -> list[Position]:
    """Append commits from `end` on; the position after each."""
    log = LogWriter(folder, end or Position())
    ends = [log.append(payload) for payload in payloads]
    log.close()
    return ends


def payloads_of(folder: Path, start: Position | None = None) -> list[bytes]:
    """The payloads of the commits after `start`."""
    return [payload for _, payload in read_log(folder, start or Position())]


def end_of(folder: Path) -> Position:
    """The position after the last commit."""
    return [Position(), *(position for position, _ in read_log(folder, Position()))][-1]
