"""A live index while its folder is unwell: stray files, errors of the disk, damage, and searches meanwhile."""

import errno
import gc
import itertools
import os
import shutil
import sys
import threading

import msgpack
import numpy as np
import pyarrow as pa
import pytest

from tests.index.test_live_index import D, added, base_of, check, no_waiting_for_the_disk, unit  # noqa: F401
from umarvel_ray.errors import UserError
from umarvel_ray.index import Add, Corpus, Delete, IndexWriter, LiveIndex, live, log, make_index, snapshot, tail, writer
from umarvel_ray.index.log import Damaged, log_path
from umarvel_ray.index.records import encode
from umarvel_ray.index.snapshot import snapshots


def opened(folder):
    return IndexWriter.open(folder, "model", D, []), LiveIndex.open(folder, "model", D)


def test_stray_files_change_nothing(tmp_path):
    index, replica = opened(tmp_path)
    truth = {}
    for number in range(3):
        truth[f"{number}"] = added(f"{number}", number)
        index.commit([truth[f"{number}"]])
        shutil.copy(log_path(tmp_path, index._log.position.file), tmp_path / "log-000000000001.bak")
        (tmp_path / "snapshot-x").mkdir(exist_ok=True)
        assert replica.follow() == number + 1
        assert not index.needs_compaction
        index.compact()
        assert replica.follow() == number + 1
        check(replica, truth, unit(9), 9)
    check(LiveIndex.open(tmp_path, "model", D), truth, unit(9), 9)
    assert (tmp_path / "log-000000000001.bak").exists()
    assert (tmp_path / "snapshot-x").exists()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ESTALE, errno.EACCES, errno.EIO])
def test_an_error_of_the_disk_is_no_damage_and_passes(tmp_path, monkeypatch, code):
    index, replica = opened(tmp_path)
    index.commit([added("a", 1)])
    replica.follow()
    index.commit([added("b", 2)])
    index.compact()
    index.commit([added("c", 3)])

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    for owner, name in [(live, "_last_snapshot"), (snapshot.np, "load"), (os, "listdir"), (os, "open")]:
        with monkeypatch.context() as context:
            context.setattr(owner, name, fail)
            with pytest.raises(OSError, match=os.strerror(code)):
                replica.follow()
        assert replica.sequence == 1
    with monkeypatch.context() as context:
        context.setattr(writer, "check_index", fail)
        check(replica, {"a": added("a", 1)}, unit(1), 5)  # searches go on
    assert replica.follow() == 3
    check(replica, {id_: added(id_, seed) for id_, seed in [("a", 1), ("b", 2), ("c", 3)]}, unit(1), 5)


def test_damage_keeps_what_was_read_and_shows_what_came_before_it(tmp_path):
    index, replica = opened(tmp_path)
    index.commit([added("a", 1)])
    replica.follow()
    index.commit([added("b", 2)])
    at = index._log.position.offset
    index.commit([added("c", 3)])
    index.commit([added("d", 4)])
    with log_path(tmp_path, 1).open("r+b") as file:
        file.seek(at + 30)
        file.write(b"\xff\xff")
    for _ in range(2):
        with pytest.raises(Damaged):
            replica.follow()
        assert replica.sequence == 2
        check(replica, {"a": added("a", 1), "b": added("b", 2)}, unit(1), 5)


def test_a_folder_that_disappears_is_an_error(tmp_path):
    index, replica = opened(tmp_path / "live")
    index.commit([added("a", 1)])
    replica.follow()
    (tmp_path / "live").rename(tmp_path / "elsewhere")
    with pytest.raises(Damaged, match=r"index\.json is missing"):
        replica.follow()
    check(replica, {"a": added("a", 1)}, unit(1), 5)
    (tmp_path / "elsewhere").rename(tmp_path / "live")
    assert replica.follow() == 1


@pytest.mark.parametrize("facts", ["[]", "{}", '{"format": 1}', "null"])
def test_index_json_of_another_shape_is_damage(tmp_path, facts):
    opened(tmp_path)[0].close()
    (tmp_path / "index.json").write_text(facts)
    with pytest.raises(Damaged, match="not readable"):
        LiveIndex.open(tmp_path, "model", D)


def test_a_filter_may_name_a_source_while_it_is_added(tmp_path):
    """Real threads: every search asks for the sources that are being committed."""
    index, replica = opened(tmp_path)
    done, failed, searches, current = threading.Event(), [], [0], [0]

    def search():
        while not done.is_set():
            wanted = [f"s{current[0]}", f"s{current[0] + 1}"]
            try:
                for hit in replica.search(unit(1), 5, sources=wanted):
                    assert hit.document["source"] in wanted
                searches[0] += 1
            except Exception as error:
                failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=search) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for number in range(600):
            current[0] = number
            index.commit([Add(f"{number % 50}", unit(1), "text", f"s{number}")])
            replica.follow()
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert failed == []
    assert searches[0] > 10


def test_a_view_keeps_the_labels_of_its_moment(tmp_path):
    index, replica = opened(tmp_path)
    index.commit([Add("a", unit(1), "text", "old"), Add("b", unit(2), "text", "old")])
    replica.follow()
    view = replica._view
    index.commit([Add("a", unit(1), "text", "new"), *(Add(f"n{i}", unit(i), "text", "new") for i in range(2000))])
    replica.follow()
    assert view.search(unit(1), 9, {"source": ["new"]}) == []
    assert {hit.document["id"] for hit in view.search(unit(1), 9, {"source": ["old"]})} == {"a", "b"}
    assert len(replica.search(unit(1), 3000, filters={"source": ["new"]})) == 2001


def test_pictures_of_the_log_stay_on_disk(tmp_path):
    index, replica = opened(tmp_path)
    picture = os.urandom(1 << 16)
    for number in range(20):
        index.commit([Add(f"{number}", unit(number), "image", "news", image=picture + bytes([number]))])
    replica.follow()
    gc.collect()
    dicts = (one for one in gc.get_objects() if type(one) is dict)
    assert not any(type(image := one.get("image")) is bytes and image.startswith(picture) for one in dicts)
    sizes = [sys.getsizeof(value) for place in replica._rows._tail._places for value in place]
    assert sum(sizes) < 20 * 1000
    for number in range(20):
        [hit] = replica.search(unit(number), 1)
        assert hit.document["image"] == picture + bytes([number])


def test_a_view_reads_its_documents_after_their_file_is_removed(tmp_path):
    index, replica = opened(tmp_path)
    truth = {f"{seed}": added(f"{seed}", seed) for seed in range(4)}
    index.commit(list(truth.values()))
    replica.follow()
    for seed in range(4, 7):
        index.commit([added(f"{seed}", seed)])
        index.compact()
    assert not log_path(tmp_path, 1).exists()
    assert replica.sequence == 1
    check(replica, truth, unit(1), 9)


def test_a_search_reads_again_when_its_documents_are_no_longer_where_they_were(tmp_path, monkeypatch):
    index, replica = opened(tmp_path)
    index.commit([added("a", 1)])
    size = log_path(tmp_path, 1).stat().st_size
    index.commit([added("b", 2)])
    replica.follow()
    index.close()
    os.truncate(log_path(tmp_path, 1), size)  # the machine crashed before the commit was on disk
    index = IndexWriter.open(tmp_path, "model", D, [])
    index.commit([added("c", 3)])
    check(replica, {"a": added("a", 1), "c": added("c", 3)}, unit(1), 9)

    places = replica._rows._tail._places
    stale = [place.file for place in places]
    read = tail.LogFile.read

    def of_another_server(file, offset, size):
        if file in stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(file, offset, size)

    monkeypatch.setattr(tail.LogFile, "read", of_another_server)
    check(replica, {"a": added("a", 1), "c": added("c", 3)}, unit(1), 9)


def test_files_of_removed_logs_are_closed(tmp_path):
    index, replica = opened(tmp_path)
    for number in range(8):
        index.commit([added(f"{number}", number)])
        replica.follow()
        index.compact()
        replica.follow()
    open_ = [os.readlink(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd") if _is_link(handle)]
    assert sum("log-" in name and str(tmp_path) in name for name in open_) <= 3
    assert len(replica) == 8


def _is_link(handle):
    return os.path.lexists(f"/proc/self/fd/{handle}")


def test_compaction_holds_few_pictures_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "BYTES", 1000)
    index, replica = opened(tmp_path)
    for number in range(30):
        index.commit([Add(f"{number % 20}", unit(number), "image", "news", image=bytes([number]) * 400), Delete("3")])
    sizes = []
    from_pylist = pa.RecordBatch.from_pylist

    class Watched:
        @staticmethod
        def from_pylist(rows, schema):
            sizes.append(len(rows))
            return from_pylist(rows, schema)

    monkeypatch.setattr(snapshot.pa, "RecordBatch", Watched)
    assert index.compact() == 30
    monkeypatch.undo()
    assert max(sizes) <= 3
    assert sum(sizes) == 19
    replica.follow()
    assert replica._rows.snapshot == 30
    for number in range(10, 30):
        found = {hit.document["id"]: hit.document["image"] for hit in replica.search(unit(number), 30)}
        assert found.get(f"{number % 20}") == (None if number % 20 == 3 else bytes([number]) * 400)


def test_a_commit_is_acknowledged_whatever_the_folder_looks_like(tmp_path, monkeypatch):
    index, _ = opened(tmp_path)
    monkeypatch.setattr(writer, "COMPACT_BYTES", 1000)

    def fail(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "listdir", fail)
    for number in range(20):
        assert index.commit([added(f"{number}", number)]).sequence == number + 1
    assert index.needs_compaction
    with pytest.raises(UserError, match="cannot compact"):
        index.compact()
    monkeypatch.undo()
    index.compact()
    assert not index.needs_compaction
    assert snapshots(tmp_path) == [20]


def test_a_writer_that_starts_after_a_failed_compaction_continues_in_the_new_file(tmp_path, monkeypatch):
    index, replica = opened(tmp_path)
    truth = {f"{seed}": added(f"{seed}", seed) for seed in range(3)}
    index.commit([truth["0"]])

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(writer, "write_snapshot", fail)
        with pytest.raises(UserError, match="No space"):
            index.compact()
    for seed in (1, 2):
        index.close()
        index = IndexWriter.open(tmp_path, "model", D, [])
        index.commit([truth[f"{seed}"]])
    for one in (replica, LiveIndex.open(tmp_path, "model", D)):
        assert one.follow() == 3
        check(one, truth, unit(9), 9)


def test_a_new_log_file_that_cannot_be_opened_is_not_left_behind(tmp_path, monkeypatch):
    index, replica = opened(tmp_path)
    index.commit([added("a", 1)])

    def fail(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as context:
        context.setattr(log, "sync_folder", fail)
        with pytest.raises(UserError, match="Too many open files"):
            index.compact()
    index.commit([added("b", 2)])
    assert (replica.follow(), LiveIndex.open(tmp_path, "model", D).sequence) == (2, 2)
    assert index.compact() == 2


def test_a_log_and_a_snapshot_of_before_there_was_metadata_still_open(tmp_path, monkeypatch):
    plain = [Add(f"{seed}", unit(seed), "text", "news", text=f"text {seed}") for seed in range(4)]
    fields = msgpack.unpackb(encode(plain, D))
    assert all("metadata" not in one for one in fields)
    schema = pa.schema([field for field in snapshot.SCHEMA if field.name != "metadata"])
    index = IndexWriter.open(tmp_path, "model", D, [])
    index.commit(plain[:2])
    with monkeypatch.context() as context:
        context.setattr(snapshot, "SCHEMA", schema)
        index.compact()
    index.commit(plain[2:])
    index.close()
    index, replica = opened(tmp_path)
    check(replica, {one.id: one for one in plain}, unit(1), 9)
    assert replica.search(unit(1), 9, filters={"language": ["en"]}) == []
    index.commit([added("new", 3)])
    index.compact()
    assert replica.follow() == 3
    check(replica, {one.id: one for one in [*plain, added("new", 3)]}, unit(1), 9)
    [hit] = replica.search(unit(1), 9, filters={"language": [added("new", 3).metadata["language"]]})
    assert hit.document["id"] == "new"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"source": "news"}, "metadata cannot be called 'source'"),
        ({"image": "x"}, "metadata cannot be called 'image'"),
        ({"year": True}, "'year' is True, which is neither"),
        ({"year": 2.5}, "neither a string nor a whole number"),
        ({"year": 2**63}, "64 bits"),
        ({"tags": ["a"]}, "neither"),
        ({"language": "\ud800"}, "surrogate"),
    ],
)
def test_metadata_that_cannot_be_filtered_by_is_an_error(tmp_path, metadata, message):
    index, _ = opened(tmp_path)
    with pytest.raises(UserError, match=message):
        index.commit([Add("a", unit(1), "text", "news", metadata=metadata)])
    assert index.sequence == 0


def test_columns_of_every_type_are_filtered_or_match_nothing(tmp_path):
    from umarvel_ray.data.stored import write_stored

    columns = {
        "id": ["a", "b", "c"],
        "text": ["x", "y", "z"],
        "image": pa.nulls(3, pa.large_binary()),
        "modality": ["text"] * 3,
        "source": ["news"] * 3,
        "content_key": [1, 2, 3],
        "large": pa.array(["en", None, "de"], pa.large_string()),
        "small": pa.array([1, None, -1], pa.int8()),
        "unsigned": pa.array([2**64 - 1, 1, None], pa.uint64()),
        "float": [2024.0, None, 1.5],
        "flag": [True, False, None],
        "tags": [["en"], [], None],
        "nothing": pa.nulls(3),
    }
    table = pa.table(columns)
    documents = write_stored(tmp_path / "documents.arrow", table.schema, table.to_batches())
    index = make_index(["c", "a", "b"], np.stack([unit(seed) for seed in range(3)]))
    replica = LiveIndex.open(None, "model", D, Corpus(index, documents, np.array([2, 0, 1])))

    def found(name, *values):
        return {hit.document["id"] for hit in replica.search(unit(1), 9, filters={name: values})}

    assert found("large", "en") == {"a"}
    assert found("large", "de", 1, "other") == {"c"}
    assert found("small", 1, 300, "1") == {"a"}
    assert found("small", -1, 1) == {"a", "c"}
    assert found("unsigned", 2**64 - 1, -1) == {"a"}
    assert found("float", 2024) == {"a"}
    for name in ("flag", "tags", "nothing", "id", "text", "image", "content_key", "other"):
        assert found(name, "a", "x", "en", 1, 0, 2024) == set(), name
    assert found("source", "news") == {"a", "b", "c"}


def test_memory_does_not_grow_with_the_number_of_names(tmp_path):
    """Each document under a name of its own: one entry for each, not a column as long as the index."""
    index, replica = opened(tmp_path)
    for start in range(0, 2000, 100):
        index.commit(
            [Add(f"{i}", unit(1), "text", "news", metadata={f"name {i}": i}) for i in range(start, start + 100)]
        )
    replica.follow()
    rows = replica._rows._tail._labels._rows
    assert len(rows) == 2002
    assert sum(len(one) for one in rows.values()) == 3 * 2000
    index.compact()
    replica.follow()
    for i in itertools.chain(range(3), [1999]):
        [hit] = replica.search(unit(1), 9, filters={f"name {i}": [i]})
        assert hit.document["metadata"] == {f"name {i}": i}


def test_a_new_writer_of_another_model_fails_before_it_waits(tmp_path):
    index, _ = opened(tmp_path)
    with pytest.raises(UserError, match="another model"):
        IndexWriter.open(tmp_path, "other", D, [], wait_s=60)
    with pytest.raises(writer.Locked):
        IndexWriter.open(tmp_path, "model", D, [])
    index.close()
