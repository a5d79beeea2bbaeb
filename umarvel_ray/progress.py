"""Progress of a job: a bar on a terminal, an occasional plain line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from tqdm import tqdm

LINE_EVERY_S = 10.0


class Bar(Protocol):
    def update(self, n: int = 1) -> object: ...


@contextmanager
def progress(total: int, what: str, unit: str = "it", stream: TextIO | None = None) -> Iterator[Bar]:
    """Count `total` units of `what`: `with progress(1000, "embed documents", "doc") as bar: bar.update(32)`.

    On a terminal, `stream` (stderr by default) shows a tqdm bar. Otherwise it gets a line every 10 s or every 10 %,
    whichever is rarer, and a closing line with the count, the rate and the time.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        with tqdm(total=total, desc=what, unit=f" {unit}", file=stream, dynamic_ncols=True) as bar:
            yield bar
        return
    lines = _Lines(total, what, unit, stream)
    yield lines
    lines.close()


class _Lines:
    """Progress as lines, for output that is not a terminal."""

    def __init__(self, total: int, what: str, unit: str, stream: TextIO) -> None:
        self._total, self._what, self._unit, self._stream = total, what, unit, stream
        self._done, self._reported = 0, 0
        self._start = self._reported_at = time.monotonic()

    def update(self, n: int = 1) -> None:
        self._done += n
        now = time.monotonic()
        far_enough = (self._done - self._reported) * 10 >= self._total
        if far_enough and now - self._reported_at >= LINE_EVERY_S and self._done < self._total:
            self._reported, self._reported_at = self._done, now
            rate = self._done / (now - self._start)
            self._print(f"{self._done / self._total:.0%} · {rate:.3g} {self._unit}/s · {_clock(self._left(rate))} left")

    def close(self) -> None:
        seconds = time.monotonic() - self._start
        rate = self._done / max(seconds, 1e-9)
        end = "done" if self._done >= self._total else "stopped"
        self._print(f"{end} · {rate:.3g} {self._unit}/s · {_clock(seconds)}")

    def _left(self, rate: float) -> float:
        return (self._total - self._done) / rate

    def _print(self, tail: str) -> None:
        print(f"{self._what}: {self._done:,}/{self._total:,} {self._unit} · {tail}", file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"
