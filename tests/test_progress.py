"""Progress: few lines in a log, correct counts, a closing line, a bar on a terminal."""

from __future__ import annotations

import io
import os
import pty
import termios
from contextlib import suppress

import pytest

from umarvel_ray import progress as module
from umarvel_ray.progress import progress


def test_a_log_gets_a_line_every_tenth_and_a_closing_one(monkeypatch):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    log = io.StringIO()
    with progress(1000, "embed", "doc", log) as bar:
        for _ in range(1000):
            bar.update()
    lines = log.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{n:,}/1,000" for n in range(100, 1001, 100)]
    assert "50%" in lines[4]
    assert lines[-1].startswith("embed: 1,000/1,000 doc · done")


def test_a_quick_job_writes_one_line():
    log = io.StringIO()
    with progress(3, "read", "file", log) as bar:
        for _ in range(3):
            bar.update()
    assert len(log.getvalue().splitlines()) == 1


def test_a_failed_job_does_not_claim_to_be_done():
    log = io.StringIO()
    with pytest.raises(ZeroDivisionError), progress(2, "read", "file", log):
        raise ZeroDivisionError
    assert "done" not in log.getvalue()


def test_a_terminal_gets_a_bar():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal, progress(2, "read", "file", terminal) as bar:
        bar.update(2)
    shown = ""
    with suppress(OSError):  # raised by Linux once the other side is closed and everything is read
        while piece := os.read(ours, 4096).decode():
            shown += piece
    os.close(ours)
    assert "read: 100%" in shown
    assert "2/2" in shown


def test_a_job_that_ends_early_says_stopped():
    log = io.StringIO()
    with progress(400, "train", "step", log) as bar:
        bar.update(5)
    assert log.getvalue().startswith("train: 5/400 step · stopped")
