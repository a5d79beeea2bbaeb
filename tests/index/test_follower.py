"""The thread that follows a live index, and the writer that takes it over, without a cluster."""

import asyncio
import errno
import logging
import os
import time
from types import SimpleNamespace

import pytest

from tests.index.test_live_index import D, added, check, no_waiting_for_the_disk, unit  # noqa: F401
from umarvel_ray.errors import UserError
from umarvel_ray.index import IndexWriter, LiveIndex
from umarvel_ray.index.log import Damaged, log_path
from umarvel_ray.index.writer import Locked
from umarvel_ray.serving import corpus, follower
from umarvel_ray.serving.corpus import SearchDeployment, WriterDeployment
from umarvel_ray.serving.errors import Busy
from umarvel_ray.serving.follower import FOLLOW_S, REPLACE_S, REPORT_S, SLOWEST_S, Follower


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(follower, "time", SimpleNamespace(monotonic=lambda: self.now))


class Index:
    """Fails with `error`, if there is one."""

    error = None

    def follow(self):
        if self.error:
            raise self.error


@pytest.fixture
def logged(caplog):
    caplog.set_level(logging.INFO, logger="ray.serve")
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records]
    logging.getLogger("ray.serve").removeHandler(caplog.handler)


ERRORS = [
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ESTALE, "Stale file handle"),
    PermissionError(errno.EACCES, "Permission denied"),
    Damaged("damaged"),
    UserError("another model"),
    ValueError("invalid literal for int()"),
    TypeError("unexpected keyword"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_every_failure_is_tried_again_more_and_more_slowly_and_logged_once_a_minute(monkeypatch, logged, error):
    clock, index = Clock(monkeypatch), Index()
    follows = Follower(index)
    assert follows.step() == FOLLOW_S
    index.error = error
    pauses = []
    while clock.now < 1000 + 2.5 * REPORT_S:
        pauses.append(follows.step())
        clock.now += pauses[-1]
        assert follows.behind_s == pytest.approx(clock.now - 1000)
    assert pauses == sorted(pauses)
    assert pauses[0] > FOLLOW_S
    assert pauses[-1] == SLOWEST_S
    assert len(logged()) == 3
    assert all(str(error) in line and "\n" not in line for line in logged())
    index.error = OSError(errno.EIO, "another error")
    follows.step()
    assert "another error" in logged()[-1]
    index.error = None
    assert follows.step() == FOLLOW_S
    assert "followed again" in logged()[-1]
    assert follows.behind_s == 0
    index.error = error
    follows.step()
    assert str(error) in logged()[-1]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_only_what_ends_with_the_process_fails_its_health_and_only_if_it_lasts(monkeypatch, error):
    clock, index = Clock(monkeypatch), Index()
    follows = Follower(index)
    index.error = error
    follows.step()
    follows.check_health()
    clock.now += REPLACE_S + 1
    follows.step()
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ESTALE):
        with pytest.raises(OSError, match=error.strerror):
            follows.check_health()
    else:
        follows.check_health()
    index.error = None
    follows.step()
    follows.check_health()


def until(reached, seconds=30.0):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_thread_outlives_errors_and_catches_up(tmp_path, monkeypatch):
    monkeypatch.setattr(follower, "FOLLOW_S", 0.01)
    monkeypatch.setattr(follower, "SLOWEST_S", 0.02)
    index = IndexWriter.open(tmp_path, "model", D, [])
    replica = LiveIndex.open(tmp_path, "model", D)
    follows = Follower(replica)
    follows.start()
    listdir, calls = os.listdir, []

    def fail(path):
        calls.append(path)
        raise OSError(errno.EMFILE, "Too many open files")

    index.commit([added("a", 1)])
    until(lambda: replica.sequence == 1)
    monkeypatch.setattr(os, "listdir", fail)
    index.commit([added("b", 2)])
    until(lambda: len(calls) > 3)
    assert replica.sequence == 1
    assert follows.behind_s > 0
    check(replica, {"a": added("a", 1)}, unit(1), 5)
    monkeypatch.setattr(os, "listdir", listdir)
    until(lambda: replica.sequence == 2)
    log_path(tmp_path, 1).rename(tmp_path / "away")
    time.sleep(0.05)
    (tmp_path / "away").rename(log_path(tmp_path, 1))
    index.commit([added("c", 3)])
    until(lambda: replica.sequence == 3)
    index.close()


@pytest.fixture
def deployed(tmp_path, monkeypatch):
    """Replicas of a deployment, as plain objects."""
    monkeypatch.setattr(corpus, "open_base", lambda *args: (None, D))
    checkpoint = SimpleNamespace(identity="model", path="nowhere")
    return lambda deployment: deployment.func_or_class(checkpoint, None, "", str(tmp_path / "live"))


def test_a_new_writer_is_ready_at_once_and_takes_over_when_the_old_one_exits(tmp_path, monkeypatch, deployed, logged):
    monkeypatch.setattr(corpus, "LOCK_REPORT_S", 0.2)
    old = IndexWriter.open(tmp_path / "live", "model", D, [])
    old.commit([added("a", 1)])
    started = time.monotonic()
    new, search = deployed(WriterDeployment), deployed(SearchDeployment)
    assert time.monotonic() - started < 60
    with pytest.raises(Busy):
        asyncio.run(new.commit("model", [added("b", 2)]))
    until(lambda: any("another writer holds this index" in line for line in logged()))
    new.check_health()
    search.check_health()
    assert old.commit([added("b", 2)]).sequence == 2
    until(lambda: asyncio.run(search.state()).sequence == 2)
    old.close()
    until(lambda: new._writer is not None)
    assert new._writer.commit([added("c", 3)]).sequence == 3
    until(lambda: asyncio.run(search.state())[:2] == (3, 3))
    assert asyncio.run(search.state()).behind_s < 30
    hits = asyncio.run(search.search("model", unit(1), 9, {"year": [1999, 2024, -1]}, 3))
    assert {hit.document["id"] for hit in hits} == {"b", "c"}


def test_a_new_writer_that_finds_damage_when_it_takes_over_is_unhealthy(tmp_path, deployed):
    old = IndexWriter.open(tmp_path / "live", "model", D, [])
    new = deployed(WriterDeployment)
    (tmp_path / "live" / "index.json").write_text("{")
    old.close()
    until(lambda: new._failure is not None)
    with pytest.raises(UserError, match="not readable"):
        new.check_health()
    with pytest.raises(Busy):
        asyncio.run(new.commit("model", [added("a", 1)]))
    with pytest.raises(UserError, match="not readable"):  # the replica that Serve starts instead says so
        deployed(WriterDeployment)


def test_only_one_of_several_new_writers_takes_over(tmp_path, deployed):
    old = IndexWriter.open(tmp_path / "live", "model", D, [])
    new = [deployed(WriterDeployment) for _ in range(3)]
    old.close()
    until(lambda: any(one._writer is not None for one in new))
    time.sleep(0.2)
    assert sum(one._writer is not None for one in new) == 1
    with pytest.raises(Locked):
        IndexWriter.open(tmp_path / "live", "model", D, [])
