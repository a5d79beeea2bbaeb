"""The write-ahead log: crashes at every byte, damage, a full disk, and readers that follow."""

import os
import resource
import struct
import zlib

import pytest

from tests.support.logs import end_of, payloads_of, write
from umarvel_ray.index.log import Damaged, LogWriter, NoSpace, Position, log_path, read_log

PAYLOADS = [b"first", b"second " * 9, b"", b"fourth"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("fsync", "fdatasync"):  # no test here can lose power, and hundreds of calls are slow
        monkeypatch.setattr(os, name, lambda handle: None)
    (tmp_path / "log-000000000001").touch()
    return tmp_path


def test_a_file_is_what_its_docstring_says(folder):
    write(folder, PAYLOADS)
    expected, previous = b"", 0
    for payload in PAYLOADS:
        crc = zlib.crc32(struct.pack("<QII", len(expected), len(payload), previous) + payload)
        expected += struct.pack("<4sIII", b"UMWL", len(payload), previous, crc) + payload
        previous = crc
    assert log_path(folder, 1).read_bytes() == expected


def test_reading_resumes_at_a_position(folder):
    ends = write(folder, PAYLOADS[:2])
    assert payloads_of(folder) == PAYLOADS[:2]
    assert payloads_of(folder, ends[0]) == PAYLOADS[1:2]
    write(folder, PAYLOADS[2:], end_of(folder))
    assert payloads_of(folder, ends[1]) == PAYLOADS[2:]
    assert [position.sequence for position, _ in read_log(folder, Position())] == [1, 2, 3, 4]


@pytest.mark.parametrize("rest", [b"", b"\0"], ids=["cut", "zeros"])
def test_a_write_cut_short_at_any_byte_is_removed(folder, rest):
    ends = write(folder, PAYLOADS)
    path = log_path(folder, 1)
    whole = path.read_bytes()
    for size in range(ends[-2].offset, len(whole)):
        path.write_bytes(whole[:size] + rest * (len(whole) - size))
        assert payloads_of(folder) == PAYLOADS[:-1], size
        write(folder, [b"x"], end_of(folder))
        assert payloads_of(folder) == [*PAYLOADS[:-1], b"x"], size
        assert path.stat().st_size == end_of(folder).offset


def test_a_torn_document_that_contains_a_log_is_torn_not_damaged(folder):
    write(folder, PAYLOADS)
    path = log_path(folder, 1)
    write(folder, [path.read_bytes() * 2], end_of(folder))
    os.truncate(path, path.stat().st_size - 1)
    assert payloads_of(folder) == PAYLOADS


def test_damage_before_the_last_commit_is_an_error_at_any_byte(folder):
    ends = write(folder, PAYLOADS)
    path = log_path(folder, 1)
    whole = path.read_bytes()
    for at in range(ends[-2].offset):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(Damaged, match=r"damaged|does not follow"):
            payloads_of(folder)


def test_a_new_file_continues_the_old_one(folder):
    log = LogWriter(folder, Position())
    log.roll()  # no effect: the file is still empty
    for payload in PAYLOADS[:2]:
        log.append(payload)
    middle = log.position
    log.roll()
    log.append(PAYLOADS[2])
    log.close()
    assert sorted(path.name for path in folder.iterdir()) == ["log-000000000001", "log-000000000003"]
    assert payloads_of(folder) == PAYLOADS[:3]
    assert payloads_of(folder, middle) == PAYLOADS[2:3]
    write(folder, PAYLOADS[3:], end_of(folder))
    assert payloads_of(folder) == PAYLOADS

    os.truncate(log_path(folder, 1), middle.offset - 1)  # commits in an older file were acknowledged
    with pytest.raises(Damaged, match="ends after commit 1, but the next file begins with 3"):
        payloads_of(folder)
    log_path(folder, 1).unlink()
    with pytest.raises(Damaged, match="missing"):
        payloads_of(folder)


@pytest.mark.parametrize("others", [[], [b"f0urth"], [b"other", b"and longer than it was"]])
def test_a_reader_notices_that_a_commit_it_has_read_was_undone(folder, others):
    ends = write(folder, PAYLOADS)
    os.truncate(log_path(folder, 1), ends[2].offset)  # the machine crashed before its fsync, after a reader saw it
    write(folder, [*others, b"x" * 200] if others else [], ends[2])
    with pytest.raises(Damaged):
        payloads_of(folder, ends[3])


def test_a_full_disk_leaves_the_log_as_it_was(folder):
    log = LogWriter(folder, Position())
    log.append(b"first")
    size = log.position.offset
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, limits[1]))
    try:
        with pytest.raises(NoSpace, match="free space"):
            log.append(b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log_path(folder, 1).stat().st_size == size
    log.append(b"second")
    assert payloads_of(folder) == [b"first", b"second"]


def test_a_commit_is_on_disk_when_append_returns(folder, monkeypatch):
    log, synced = LogWriter(folder, Position()), []
    monkeypatch.setattr(os, "fdatasync", lambda handle: synced.append(os.fstat(handle).st_size))
    for payload in PAYLOADS:
        log.append(payload)
        assert synced[-1] == log.position.offset == log_path(folder, 1).stat().st_size
    assert len(synced) == len(PAYLOADS)
