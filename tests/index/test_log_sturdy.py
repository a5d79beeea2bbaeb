"""The log against hostile bytes, half-written commits, damage and stray files."""

import errno
import itertools
import os
import shutil
import struct
import tempfile
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.support.logs import end_of, payloads_of, write
from umarvel_ray.errors import UserError
from umarvel_ray.index import frames
from umarvel_ray.index.frames import MAGIC
from umarvel_ray.index.log import Damaged, LogWriter, Position, log_files, log_path, read_log
from umarvel_ray.index.snapshot import snapshots

HEADER = 16


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda handle: None)


@contextmanager
def new_folder():
    folder = Path(tempfile.mkdtemp(prefix="umarvel-log-"))
    try:
        (folder / "log-000000000001").touch()
        yield folder
    finally:
        shutil.rmtree(folder)


def fake_frame(offset, payload=b"forged", previous=0):
    """A frame that is valid at this offset, as a client could send it inside a picture."""
    crc = zlib.crc32(struct.pack("<QII", offset, len(payload), previous) + payload)
    return struct.pack("<4sIII", MAGIC, len(payload), previous, crc) + payload


def hostile(start, size):
    """A payload of valid frames for a frame that begins at `start`."""
    data = b""
    while len(data) < size:
        data += fake_frame(start + HEADER + len(data))
    return data


def test_other_names_in_the_folder_are_ignored(tmp_path):
    log = LogWriter(tmp_path, Position())
    log.append(b"first")
    for name in [
        "log-000000000001.bak",
        "log-1",
        "log-0000000000002",
        "log-",
        "log-٠٠٠٠٠٠٠٠٠٠٠٢",
        "log-000000000002~",
        "snapshot-x",
        "snapshot-000000000001.old",
        ".snapshot.partial",
        "lost+found",
    ]:
        shutil.copy(log_path(tmp_path, 1), tmp_path / name)
    log.append(b"second")
    assert (log_files(tmp_path), snapshots(tmp_path)) == ([1], [])
    assert payloads_of(tmp_path) == [b"first", b"second"]


def test_a_number_of_more_digits_is_a_name_too(tmp_path):
    log_path(tmp_path, 10**12).touch()
    assert log_files(tmp_path) == [10**12]


def test_a_reader_waits_for_the_rest_of_a_commit_however_it_arrives(tmp_path):
    """At every moment of a write, in any order of its parts, with frames that are valid where they lie inside it."""
    [end] = write(tmp_path, [b"first"])
    path = log_path(tmp_path, 1)
    before = path.read_bytes()
    payload = hostile(end.offset, 300)
    write(tmp_path, [payload], end)
    frame = path.read_bytes()[len(before) :]
    for size in range(len(frame)):
        path.write_bytes(before + frame[:size])
        assert payloads_of(tmp_path) == [b"first"], size
    for first, last in itertools.combinations(range(HEADER, len(frame), 7), 2):  # a hole that is filled later
        partial = frame[:first] + bytes(last - first) + frame[last:]
        path.write_bytes(before + partial)
        assert partial == frame or payloads_of(tmp_path) == [b"first"], (first, last)
    path.write_bytes(before + frame)
    assert payloads_of(tmp_path) == [b"first", payload]


def test_a_crash_in_a_hostile_commit_does_not_stop_the_writer(tmp_path):
    [end] = write(tmp_path, [b"first"])
    write(tmp_path, [hostile(end.offset, 4096)], end)
    os.truncate(log_path(tmp_path, 1), end.offset + 2000)
    write(tmp_path, [b"second"], [*(position for position, _ in read_log(tmp_path, Position()))][-1])
    assert payloads_of(tmp_path) == [b"first", b"second"]


@pytest.mark.parametrize("header", ["there", "lost"])
def test_the_bytes_read_grow_with_the_log_and_not_with_its_content(tmp_path, monkeypatch, header):
    def bytes_read(count):
        """For a torn commit of `count` headers, each of a frame that reaches to its end."""
        path = log_path(tmp_path, 1)
        path.unlink(missing_ok=True)
        junk = b"".join(struct.pack("<4sIII", MAGIC, (count - row - 3) * HEADER, 0, 0) for row in range(count - 3))
        [end] = write(tmp_path, [b"first"])
        write(tmp_path, [junk + bytes(40)], end)
        os.truncate(path, path.stat().st_size - 8)
        if header == "lost":
            with path.open("r+b") as file:
                file.seek(end.offset)
                file.write(bytes(HEADER))
        read = [0]
        original = frames.read_at

        def counted(handle, offset, length):
            data = original(handle, offset, length)
            read[0] += len(data)
            return data

        with monkeypatch.context() as context:
            context.setattr(frames, "read_at", counted)
            if header == "there":
                assert payloads_of(tmp_path) == [b"first"]
            else:  # a torn commit cannot be told from a damaged one
                with pytest.raises(Damaged):
                    payloads_of(tmp_path)
        return read[0], path.stat().st_size

    for count in (1000, 4000, 16000):
        read, size = bytes_read(count)
        assert read < 4 * size


def test_a_commit_of_one_byte_per_mebibyte_boundary_is_found_damaged(tmp_path):
    """The scan for a later commit looks at every offset, those where two of its pieces meet too."""
    for extra in range(2 * HEADER):
        log_path(tmp_path, 1).unlink(missing_ok=True)
        ends = write(tmp_path, [bytes(frames._CHUNK - HEADER - extra), b"last"])
        with log_path(tmp_path, 1).open("r+b") as file:
            file.seek(4)
            file.write(b"\xff\xff\xff\x7f")  # its length
        with pytest.raises(Damaged, match="later commits follow"):
            payloads_of(tmp_path)
        assert len(ends) == 2


def test_what_a_failed_commit_has_left_does_not_follow_the_next_one(tmp_path, monkeypatch):
    """The rest of a longer commit, whose bytes a client chose, would be read as what follows a shorter one."""
    log = LogWriter(tmp_path, Position())
    end = log.append(b"first")
    short = b"short"

    def fail(handle):
        raise OSError(errno.EIO, "failed")

    class Stuck:
        """A disk that takes no change of the file's size."""

        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def truncate(self, size):
            raise OSError(errno.EIO, "failed")

    monkeypatch.setattr(os, "fdatasync", fail)
    file, log._file = log._file, Stuck(log._file)
    with pytest.raises(UserError, match="cannot write"):
        log.append(bytes(len(short)) + hostile(end.offset + len(short), 200))
    monkeypatch.setattr(os, "fdatasync", lambda handle: None)
    with pytest.raises(UserError, match="cannot write"):
        log.append(short)
    log._file = file
    log.append(short)
    assert payloads_of(tmp_path) == [b"first", short]
    assert log_path(tmp_path, 1).stat().st_size == log.position.offset


PAYLOADS = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.lists(st.sampled_from([MAGIC, b"UM", b"\0" * 4, b"\x01\0\0\0", fake_frame(21)]), max_size=12).map(b"".join),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(payloads=PAYLOADS, data=st.data())
def test_a_log_cut_anywhere_holds_the_commits_before_the_cut(payloads, data):
    with new_folder() as folder:
        ends = write(folder, payloads)
        path = log_path(folder, 1)
        size = data.draw(st.integers(0, ends[-1].offset))
        whole = path.read_bytes()
        cut = whole[:size] + bytes(data.draw(st.sampled_from([0, 1, len(whole) - size])))
        kept = [payload for payload, end in zip(payloads, ends, strict=True) if cut.startswith(whole[: end.offset])]
        path.write_bytes(cut)
        assert payloads_of(folder) == kept
        write(folder, [b"next"], end_of(folder))
        assert payloads_of(folder) == [*kept, b"next"]


@settings(max_examples=300, deadline=None)
@given(payloads=PAYLOADS, data=st.data())
def test_a_changed_byte_gives_an_error_unless_it_is_in_the_last_commit(payloads, data):
    """There, nothing tells damage from a write that a crash cut short, unless the bytes inside look like a commit."""
    with new_folder() as folder:
        ends = write(folder, payloads)
        path = log_path(folder, 1)
        whole = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(whole)
        last = ends[-2].offset if len(ends) > 1 else 0
        try:
            assert payloads_of(folder) == payloads[:-1]
            assert at >= last
        except Damaged:
            pass


@settings(max_examples=60, deadline=None)
@given(payloads=PAYLOADS, data=st.data())
def test_lost_blocks_give_an_error_if_a_commit_follows(payloads, data):
    """Several bytes in a row become zero, as in a bad sector."""
    with new_folder() as folder:
        ends = write(folder, [*payloads, b"last"])
        path = log_path(folder, 1)
        whole = path.read_bytes()
        start = data.draw(st.integers(0, ends[-2].offset - 1))
        stop = data.draw(st.integers(start + 1, ends[-2].offset))
        changed = whole[:start] + bytes(stop - start) + whole[stop:]
        path.write_bytes(changed)
        if changed == whole:
            assert payloads_of(folder) == [*payloads, b"last"]
        else:
            with pytest.raises(Damaged):
                payloads_of(folder)


@settings(max_examples=60, deadline=None)
@given(
    payloads=PAYLOADS,
    steps=st.lists(st.sampled_from(["write", "half", "rest", "crash", "roll", "read"]), min_size=4, max_size=40),
    cut=st.floats(0, 1),
)
def test_any_interleaving_of_a_writer_and_a_reader(payloads, steps, cut):
    """A reader that goes on from where it was has always seen a prefix of the commits, and all once it reads."""
    with new_folder() as folder:
        log, written, read, position = LogWriter(folder, Position()), [], [], Position()
        half = None  # a commit of which only a part is in the file
        source = itertools.cycle(payloads)
        for step in [*steps, "rest", "read"]:
            path = log_path(folder, log.position.file)
            if step == "write" and not half:
                written.append(next(source))
                log.append(written[-1])
            elif step == "half" and not half:
                payload, offset = next(source), log.position.offset
                frame, _ = frames.frame_of(payload, offset, log.position.crc)
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(frame[: int(cut * (len(frame) - 1))])
                half = payload
            elif step == "rest" and half is not None:
                log.append(half)
                written.append(half)
                half = None
            elif step == "crash":
                end = [Position(), *(one for one, _ in read_log(folder, Position()))][-1]
                log.close()
                log, half = LogWriter(folder, end), None
            elif step == "roll" and half is None:
                log.roll()
            elif step == "read":
                news = list(read_log(folder, position))
                read += [payload for _, payload in news]
                position = news[-1][0] if news else position
                assert read == written
        log.close()


def test_a_reader_beside_a_writer_sees_every_commit_once(tmp_path):
    """Real threads: commits of up to 2 MiB, whose bytes look like frames, while a reader polls without a pause."""
    log, seen, done, failed = LogWriter(tmp_path, Position()), [], threading.Event(), []
    sizes = [10, 2 << 20, 300, 1 << 20] * 6

    def follow():
        position = Position()
        try:
            while not done.is_set() or len(seen) < len(sizes):
                for reached, payload in read_log(tmp_path, position):
                    seen.append(payload)
                    position = reached
        except Exception as error:
            failed.append(error)

    reader = threading.Thread(target=follow)
    reader.start()
    sent = []
    for number, size in enumerate(sizes):
        sent.append((fake_frame(log.position.offset + HEADER) * (size // 20))[:size] + bytes([number]))
        log.append(sent[-1])
        if number % 7 == 6:
            log.roll()
    done.set()
    reader.join(60)
    assert failed == []
    assert seen == sent
