"""A thread that keeps a replica of the live index up to date, whatever becomes of the files."""

from __future__ import annotations

import errno
import logging
import threading
import time

from umarvel_ray.index.live import LiveIndex

FOLLOW_S = 0.2  # how often a replica reads the writer's log
SLOWEST_S = 10.0  # the longest pause between attempts that fail
REPORT_S = 60.0  # how often a failure that lasts is logged
REPLACE_S = 60.0  # how long one may last that ends with this process
ENDS_WITH_PROCESS = (errno.EMFILE, errno.ESTALE)

logger = logging.getLogger("ray.serve")


class Follower:
    """Follows a live index: searches go on with what has been read, and every failure is tried again."""

    def __init__(self, index: LiveIndex) -> None:
        self._index = index
        self._read_at = time.monotonic()  # all that was written before has been read
        self._failure: Exception | None = None
        self._reported, self._reported_at = "", 0.0
        self._pause_s = FOLLOW_S

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def behind_s(self) -> float:
        """Seconds since the log was last read to its end; under a second unless reading fails or is slow."""
        return time.monotonic() - self._read_at

    def check_health(self) -> None:
        """Fail if another process could read what this one cannot.

        Of a damaged log, or a disk that nobody reaches, a new replica would read nothing: an old one that is behind is
        better.

        Raises:
            OSError: what has kept this one from reading for `REPLACE_S`.
        """
        failure = self._failure
        if isinstance(failure, OSError) and failure.errno in ENDS_WITH_PROCESS and self.behind_s > REPLACE_S:
            raise failure

    def step(self) -> float:
        """Try once; returns the seconds to wait before the next attempt."""
        started = time.monotonic()
        try:
            self._index.follow()
        except Exception as error:
            self._failure = error
            self._pause_s = min(2 * self._pause_s, SLOWEST_S)
            self._report(error)
        else:
            if self._failure:
                logger.info("the live index is followed again, after %.0f s", self.behind_s)
            self._failure, self._reported, self._pause_s, self._read_at = None, "", FOLLOW_S, started
        return self._pause_s

    def _report(self, error: Exception) -> None:
        now, message = time.monotonic(), f"{type(error).__name__}: {error}"
        if message != self._reported or now - self._reported_at >= REPORT_S:
            logger.error("the live index cannot be followed, for %.0f s now: %s", self.behind_s, message)
            self._reported, self._reported_at = message, now

    def _run(self) -> None:
        while True:
            time.sleep(self.step())
