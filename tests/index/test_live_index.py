"""The live index against a dict and numpy: after additions, deletions, compactions, restarts and killed processes."""

import atexit
import itertools
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from umarvel_ray.data.stored import write_stored
from umarvel_ray.errors import UserError
from umarvel_ray.index import Add, Corpus, Delete, IndexWriter, LiveIndex, make_index, snapshot
from umarvel_ray.index.log import Damaged, log_files, log_path
from umarvel_ray.index.snapshot import snapshots
from umarvel_ray.items.images import pictures_of

D = 8
MODALITIES, SOURCES = ["text", "image", "image,text"], ["news", "notes", "shop"]
LANGUAGES, YEARS = ["en", "de", "日本語"], [1999, 2024, -1]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Skip fsync, since no test loses power; durability is tested by recording the calls."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda handle: None)


def unit(seed):
    vector = np.random.default_rng(seed).normal(size=D).astype(np.float32)
    return vector / np.linalg.norm(vector)


def added(id_, seed):
    """A document whose fields are all derived from its seed."""
    picture = seed.to_bytes(4, "big") * 5
    return Add(
        id_,
        unit(seed),
        MODALITIES[seed % 3],
        SOURCES[seed // 3 % 3],
        text=f"text {seed} é" if seed % 2 else None,
        image=[None, picture, [picture, picture[:3]]][seed % 4 % 3],
        metadata=metadata_of(seed),
    )


def metadata_of(seed):
    chosen = {"language": LANGUAGES[seed % 5 % 3], "year": YEARS[seed % 7 % 3]}
    return {name: value for number, (name, value) in enumerate(chosen.items()) if seed >> number & 1}


@cache
def base_of(factory, size=300):
    rows = [added(f"b{i}", 10**6 + i) for i in range(size)]
    rows = [replace(row, image=pictures_of(row.image) or None) for row in rows]  # as a column of a table has them
    documents = [row.document | {"language": None, "year": None} | row.metadata for row in reversed(rows)]
    table = pa.Table.from_pylist(documents).drop_columns("metadata")  # not in the index's order
    folder = Path(tempfile.mkdtemp(prefix="umarvel-base-"))
    atexit.register(shutil.rmtree, folder)
    documents = write_stored(folder / "documents.arrow", table.schema, table.to_batches())
    index = make_index([row.id for row in rows], np.stack([row.vector for row in rows]), factory)
    return Corpus(index, documents, documents.find(pa.array(index.ids))), {row.id: row for row in rows}


def matching(truth, modalities=None, sources=None, filters=None):
    wanted = {"modality": modalities, "source": sources} | (filters or {})
    wanted = {name: values for name, values in wanted.items() if values is not None}
    return [row for row in truth.values() if all(row.labels.get(name) in values for name, values in wanted.items())]


def document_of(row, hit):
    """The document of a hit as it was added: a row of the base has its metadata as columns."""
    columns = {name: hit.document[name] for name in ("language", "year") if hit.document.get(name) is not None}
    found = {"metadata": columns} | hit.document
    return {name: found.get(name) for name in row.document}


def check(replica, truth, query, k, modalities=None, sources=None, filters=None, exact=True):
    """`search` finds what numpy finds in the dict; with an approximate base, only what must hold regardless."""
    hits = replica.search(query, k, modalities, sources, filters)
    rows = matching(truth, modalities, sources, filters)
    assert len(hits) == min(k, len(rows)) == len({hit.document["id"] for hit in hits})
    allowed = {row.id: row for row in rows}
    for hit in hits:
        row = allowed[hit.document["id"]]
        assert document_of(row, hit) == row.document
        assert hit.score == pytest.approx(float(row.vector @ query), abs=1e-5)
    there = [hit.document["id"] for hit in hits]
    gone = sorted({"a", "b0", "b1", "b2", "c", "d", "nobody"} - truth.keys())
    assert replica.documents([*there, *gone]) == [*(hit.document for hit in hits), *[None] * len(gone)]
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    sure = rows if exact else [row for row in rows if not row.id.startswith("b")]
    found = {hit.document["id"] for hit in hits}
    for row in sure if hits else []:
        assert row.id in found or float(row.vector @ query) <= scores[-1] + 1e-5


OPERATIONS = st.lists(
    st.one_of(
        st.builds(added, st.sampled_from(["a", "b0", "b1", "b299", "c", "d", "é"]), st.integers(0, 10**5)),
        st.builds(Delete, st.sampled_from(["a", "b0", "b2", "c", "d", "nobody"])),
        st.integers(0, 10**5).map(lambda seed: added(f"n{seed % 40}", seed)),
    ),
    max_size=6,
)
FILTERS = st.dictionaries(
    st.sampled_from(["language", "year", "modality", "nobody's"]),
    st.lists(st.sampled_from([*LANGUAGES, *YEARS, "1999", 2**70, "text"]), max_size=4),
    max_size=2,
)
CHOICES = st.none() | st.lists(st.sampled_from([*MODALITIES, *SOURCES]), max_size=4)


class AnIndexIsADict(RuleBasedStateMachine):
    FACTORY, EXACT = "Flat", True

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.base, base = base_of(self.FACTORY) if self.FACTORY else (None, {})
        self.ids, self.truth = list(base), dict(base)
        self.sequence = 0
        self.open_writer()
        self.open_replica()

    def open_writer(self):
        self.writer = IndexWriter.open(self.folder, "model", D, self.ids)
        assert self.writer.sequence == self.sequence
        assert len(self.writer) == len(self.truth)

    def open_replica(self):
        self.replica = LiveIndex.open(self.folder, "model", D, self.base)
        assert self.replica.sequence == self.sequence

    @rule(records=OPERATIONS)
    def commit(self, records):
        existed = []
        for record in records:
            existed.append(record.id in self.truth)
            self.truth.pop(record.id, None)
            if isinstance(record, Add):
                self.truth[record.id] = record
        self.sequence += bool(records)
        assert self.writer.commit(records) == (self.sequence, existed)

    @rule()
    def compact(self):
        assert self.writer.compact() == self.sequence

    @rule()
    def restart_the_writer(self):
        self.writer.close()
        self.open_writer()

    @rule()
    def another_replica(self):
        self.open_replica()

    @rule(seed=st.integers(0, 10**6), k=st.integers(1, 40), modalities=CHOICES, sources=CHOICES)
    def search(self, seed, k, modalities, sources):
        assert self.replica.follow() == self.sequence
        check(self.replica, self.truth, unit(seed), k, modalities, sources, exact=self.EXACT)

    @rule(seed=st.integers(0, 10**6), k=st.integers(1, 40), sources=CHOICES, filters=FILTERS)
    def search_by_any_label(self, seed, k, sources, filters):
        assert self.replica.follow() == self.sequence
        check(self.replica, self.truth, unit(seed), k, None, sources, filters, self.EXACT)

    @invariant()
    def nothing_is_missing(self):
        if hasattr(self, "replica"):
            assert self.replica.follow() == self.sequence
            assert len(self.replica) == len(self.truth)

    def teardown(self):
        self.writer.close()
        shutil.rmtree(self.folder)


class WithoutABase(AnIndexIsADict):
    FACTORY = None


class OnIVF(AnIndexIsADict):
    FACTORY, EXACT = "IVF20,Flat", False


class OnHNSW(AnIndexIsADict):
    FACTORY, EXACT = "HNSW8", False


for machine in (AnIndexIsADict, WithoutABase, OnIVF, OnHNSW):
    machine.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestFlat, TestWithoutABase = AnIndexIsADict.TestCase, WithoutABase.TestCase
TestIVF, TestHNSW = OnIVF.TestCase, OnHNSW.TestCase


@pytest.mark.parametrize("factory", ["Flat", "IVF20,Flat", "IVF20,SQfp16", "HNSW8", "SQfp16", "RR8,IVF20,Flat"])
def test_a_filter_leaves_top_k_full_and_a_narrow_one_is_exact(factory):
    base, truth = base_of(factory, size=2000)
    vectors = np.stack([row.vector for row in truth.values()])
    rng = np.random.default_rng(0)
    for share in (1.0, 0.5, 0.04, 0.002, 0.0):
        among = rng.random(2000) < share
        for query, k in itertools.product(vectors[:5] + np.float32(0.1), (1, 20)):
            scores, rows = base.index.search_rows(query[None], k, among)
            assert rows.shape == scores.shape == (1, min(k, among.sum()))
            assert among[rows[0]].all()
            assert len(set(rows[0])) == len(rows[0])
            if share < 0.05:
                best = np.sort((vectors @ query)[among])[::-1][:k]
                assert np.allclose(scores[0], best, atol=2e-3)


def test_an_index_that_cannot_filter_rows_is_rejected_at_once(tmp_path):
    base, _ = base_of("NSG8")
    with pytest.raises(UserError, match="build a Flat, IVF or HNSW index"):
        LiveIndex.open(tmp_path, "model", D, base)


def test_a_replica_may_start_before_the_writer(tmp_path):
    base, truth = base_of("Flat")
    replica = LiveIndex.open(tmp_path / "live", "model", D, base)
    check(replica, truth, unit(1), 5)
    index = IndexWriter.open(tmp_path / "live", "model", D, base.index.ids)
    assert replica.follow() == 0
    assert index.commit([added("a", 1)]) == (1, [False])
    assert (replica.sequence, replica.follow(), replica.sequence) == (0, 1, 1)
    assert replica.search(unit(1), 1)[0].document["id"] == "a"


def test_a_replica_left_behind_by_two_compactions_follows(tmp_path):
    index = IndexWriter.open(tmp_path, "model", D, [])
    late, truth = LiveIndex.open(tmp_path, "model", D), {}
    for number in range(3):
        for seed in range(10 * number, 10 * number + 10):
            truth[f"{seed}"] = added(f"{seed}", seed)
            index.commit([truth[f"{seed}"]])
        index.compact()
        index.compact()  # nothing new
    assert snapshots(tmp_path) == [20, 30]  # the last, and the previous one for replicas that still read it
    assert log_files(tmp_path) == [21, 31]
    assert late.follow() == 30
    check(late, truth, unit(99), 30)


def test_a_snapshot_of_documents_with_one_picture_each_is_read_and_rewritten(tmp_path):
    """As they were written before a document could have several."""
    index = IndexWriter.open(tmp_path, "model", D, [])
    truth = {f"{seed}": replace(added(f"{seed}", seed), image=b"p" * seed or None) for seed in range(6)}
    index.commit(list(truth.values()))
    index.compact()
    [path] = tmp_path.glob("snapshot-*/documents.arrow")
    rows = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    images = pa.array([row.image for row in truth.values()], pa.large_binary())
    rows = rows.set_column(rows.schema.get_field_index("image"), "image", images)
    with path.open("wb") as file, pa.ipc.new_file(file, rows.schema) as old:
        old.write_table(rows, max_chunksize=4)
    check(LiveIndex.open(tmp_path, "model", D), truth, unit(9), 6)
    del index
    index = IndexWriter.open(tmp_path, "model", D, [])
    truth["new"] = added("new", 2)
    index.commit([truth["new"]])
    index.compact()
    replica = LiveIndex.open(tmp_path, "model", D)
    check(replica, truth, unit(9), 7)
    assert replica.documents(["new"])[0]["image"] == truth["new"].image
    assert len(truth["new"].image) == 2


@pytest.mark.parametrize("replacing", [4, 25, 17])  # shorter than the lost one, as long, longer
@pytest.mark.parametrize("later", [[], [("d", 4)], [("d", 4), ("e", 8)]])
def test_a_replica_drops_commits_that_a_machine_crash_undid(tmp_path, replacing, later):
    index = IndexWriter.open(tmp_path, "model", D, [])
    index.commit([added("a", 1)])
    size = log_path(tmp_path, 1).stat().st_size
    index.commit([added("b", 21)])  # not on disk yet, but a replica may see it
    replica = LiveIndex.open(tmp_path, "model", D)
    index.close()
    os.truncate(log_path(tmp_path, 1), size)
    index = IndexWriter.open(tmp_path, "model", D, [])
    written = [("c", replacing), *later]
    for id_, seed in written:
        index.commit([added(id_, seed)])
    assert replica.follow() == 1 + len(written)
    lost, found = unit(21), unit(replacing)
    away = found - (found @ lost + 0.5) * lost  # from the lost document, so that no hit is read that is no longer there
    assert [hit.document["id"] for hit in replica.search(away / np.linalg.norm(away), 1)] == ["c"]
    lost, found = unit(21), unit(replacing)
    away = found - (found @ lost + 0.5) * lost  # from the lost document, so that no hit is read that is no longer there
    assert [hit.document["id"] for hit in replica.search(away / np.linalg.norm(away), 1)] == ["c"]
    check(replica, {id_: added(id_, seed) for id_, seed in [("a", 1), *written]}, unit(9), 9)


def test_a_snapshot_that_vanishes_while_it_is_opened(tmp_path, monkeypatch):
    index, listed = IndexWriter.open(tmp_path, "model", D, []), snapshot.snapshots
    truth = {f"{seed}": added(f"{seed}", seed) for seed in range(4)}
    index.commit([truth["0"]])
    index.compact()

    def stale(folder):
        monkeypatch.undo()
        found = listed(folder)
        for seed in range(1, 4):
            index.commit([truth[f"{seed}"]])
            index.compact()
        return found

    monkeypatch.setattr(snapshot, "snapshots", stale)
    replica = LiveIndex.open(tmp_path, "model", D)
    assert snapshots(tmp_path) == [3, 4]
    check(replica, truth, unit(9), 9)


@pytest.fixture
def crashes(monkeypatch, tmp_path):
    """Copies of the index's folder as a crash before or after any system call that changes it would leave it."""
    taken, calls = [], []

    def copy():
        with monkeypatch.context() as context:
            for owner, name, original in calls:  # copying is no part of what is watched
                context.setattr(owner, name, original)
            taken.append(shutil.copytree(tmp_path / "live", tmp_path / f"crash{len(taken)}"))

    def patched(owner, name):
        original = getattr(owner, name)
        calls.append((owner, name, original))

        def call(*args, **kwargs):
            copy()
            try:
                return original(*args, **kwargs)
            finally:
                copy()

        monkeypatch.setattr(owner, name, call)

    def watch():
        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir"):
            patched(os, name)
        patched(Path, "touch")
        return taken

    yield watch
    monkeypatch.undo()


def test_a_crash_at_any_system_call_of_a_compaction_loses_nothing(tmp_path, crashes, monkeypatch):
    index, truth = IndexWriter.open(tmp_path / "live", "model", D, ["b0", "b1"]), {}
    for seed in range(12):
        truth[f"{seed % 8}"] = added(f"{seed % 8}", seed)
        index.commit([Delete("b0"), truth[f"{seed % 8}"]])
        if seed in (3, 7):
            index.compact()
    taken = crashes()
    index.compact()
    monkeypatch.undo()
    assert len(taken) > 15
    for folder in taken:
        replica = LiveIndex.open(folder, "model", D)
        assert replica.sequence == 12
        check(replica, truth, unit(99), 20)
        again = IndexWriter.open(folder, "model", D, ["b0", "b1"])
        assert again.commit([Delete("b0"), Delete("b1"), Delete("0")]) == (13, [False, True, True])
        assert again.compact() == 13
        again.close()
        assert replica.follow() == 13
        check(replica, {id_: row for id_, row in truth.items() if id_ != "0"}, unit(99), 20)
        assert {path.name[:4] for path in folder.iterdir()} == {"lock", "inde", "log-", "snap"}


def test_a_snapshot_is_on_disk_before_what_it_replaces_is_removed(tmp_path, monkeypatch):
    index, calls = IndexWriter.open(tmp_path, "model", D, []), []
    for seed in range(2):
        index.commit([added("a", seed)])
        index.compact()
    index.commit([added("a", 3)])
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    for name in ("rename", "unlink"):
        original = getattr(Path, name)
        monkeypatch.setattr(Path, name, lambda *a, name=name, original=original: calls.append(name) or original(*a))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: calls.append("rmtree"))
    index.compact()
    here = tmp_path.name
    written = ["vectors.npy", "documents.arrow", "snapshot.json", ".snapshot.partial"]
    assert calls[:3] == ["log-000000000004", here, "rmtree"]
    assert calls[3:] == [*written, "rename", here, "rmtree", "unlink"]


def test_a_search_sees_whole_commits_only(tmp_path):
    """A document that keeps being replaced, in the base, the snapshot and the tail, is always found exactly once."""
    base, _ = base_of("Flat", size=20)
    index = IndexWriter.open(tmp_path, "model", D, base.index.ids)
    replica, done, counts = LiveIndex.open(tmp_path, "model", D, base), threading.Event(), []

    def search():
        while not done.is_set():
            counts.append(sum(hit.document["id"] == "b3" for hit in replica.search(unit(5), 100)))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for seed in range(300):
            index.commit([added("b3", seed), added(f"n{seed % 50}", seed)])
            replica.follow()
            if seed % 100 == 50:
                index.compact()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert len(counts) > 20
    assert set(counts) == {1}


def test_one_writer(tmp_path):
    first = IndexWriter.open(tmp_path, "model", D, [])
    with pytest.raises(UserError, match="another writer"):
        IndexWriter.open(tmp_path, "model", D, [], wait_s=0.1)
    first.commit([added("a", 1)])
    threading.Timer(0.2, first.close).start()
    second = IndexWriter.open(tmp_path, "model", D, [], wait_s=60)
    assert second.commit([Delete("a")]) == (2, [True])
    with pytest.raises(ValueError, match="closed"):
        first.commit([added("a", 1)])


def test_errors_are_one_line(tmp_path):
    index = IndexWriter.open(tmp_path, "model", D, [])
    for record, message in [
        (Add("a", unit(1)[:4], "text", "news"), "document 'a': expected a unit vector of shape"),
        (Add("a", 2 * unit(1), "text", "news"), "norm 2.000"),
        (Add("a", np.full(D, np.nan, np.float32), "text", "news"), "norm nan"),
        (Add("a", unit(1), "text", "news", text="\ud800"), "surrogate"),
    ]:
        with pytest.raises(UserError, match=message):
            index.commit([added("b", 1), record])
    assert (index.sequence, len(index)) == (0, 0)
    with pytest.raises(UserError, match="index's own model"):
        LiveIndex.open(tmp_path, "model", D).search(np.ones(3, np.float32), 1)
    with pytest.raises(UserError, match="has dimension 8, the model 4; embed the base again"):
        LiveIndex.open(tmp_path, "model", 4, base_of("Flat")[0])
    index.commit([added("a", 1)])
    index.close()
    for open_ in (partial(IndexWriter.open, base_ids=[]), LiveIndex.open):
        with pytest.raises(UserError, match=r"embedded with another model.*choose another folder"):
            open_(tmp_path, "other", D)
        with pytest.raises(UserError, match="dimension 8, not model, 4"):
            open_(tmp_path, "model", 4)
    (tmp_path / "index.json").write_text("{")
    for open_ in (partial(IndexWriter.open, base_ids=[]), LiveIndex.open):
        with pytest.raises(Damaged, match=r"index\.json: not readable; restore"):
            open_(tmp_path, "model", D)
    shutil.rmtree(tmp_path)
    index = IndexWriter.open(tmp_path, "model", D, [])
    index.commit([added("a", 1)])
    index.compact()
    index.close()
    (tmp_path / "snapshot-000000000001" / "documents.arrow").write_bytes(b"ARROW1")
    for open_ in (partial(IndexWriter.open, base_ids=[]), LiveIndex.open):
        with pytest.raises(Damaged, match="snapshot-000000000001: not readable"):
            open_(tmp_path, "model", D)
    shutil.rmtree(tmp_path)
    IndexWriter.open(tmp_path, "model", D, []).close()
    log_path(tmp_path, 1).unlink()
    for open_ in (partial(IndexWriter.open, base_ids=[]), LiveIndex.open):
        with pytest.raises(Damaged, match="missing"):
            open_(tmp_path, "model", D)


# Writers that are killed, and replicas in another process. Each process is forked from a server with all imports done.


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def batch_of(number):
    """Commit number `number` of a writer: three documents, one of them a replacement, and a deletion."""
    return [
        added(f"{number}", number),
        added(f"{number}+", 2 * number),
        added("same", 3 * number),
        Delete(f"{number - 3}+"),
    ]


def write_until_killed(folder, acknowledged):
    index = IndexWriter.open(folder, "model", D, [], wait_s=10)
    threading.Thread(target=compact_for_ever, args=(index,), daemon=True).start()
    while True:
        acknowledged.send(index.commit(batch_of(index.sequence + 1)).sequence)


def compact_for_ever(index):
    while True:
        index.compact()
        time.sleep(0.005)


def truth_after(sequence):
    truth = {}
    for number in range(1, sequence + 1):
        for record in batch_of(number):
            truth.pop(record.id, None)
            if isinstance(record, Add):
                truth[record.id] = record
    return truth


def test_what_a_killed_writer_acknowledged_is_found(tmp_path, processes):
    rng, last, compacted = np.random.default_rng(), 0, 0
    for _ in range(6):
        acknowledged, theirs = processes.Pipe(duplex=False)
        child = processes.Process(target=write_until_killed, args=(tmp_path, theirs))
        child.start()
        theirs.close()
        last = acknowledged.recv()  # the writer is running
        time.sleep(rng.uniform(0, 0.2))
        child.kill()
        child.join()
        try:
            while True:
                last = acknowledged.recv()
        except EOFError:
            pass
        replica = LiveIndex.open(tmp_path, "model", D)
        assert replica.sequence in (last, last + 1)  # a commit may be on disk before it is acknowledged
        truth = truth_after(replica.sequence)
        assert len(replica) == len(truth)
        check(replica, truth, unit(0), len(truth))
        compacted = max(snapshots(tmp_path), default=0)
    print(f"{last} commits acknowledged through 6 kills, {compacted} compacted")
    assert compacted > 0


def follow_and_report(folder, sequence, reports):
    replica = LiveIndex.open(folder, "model", D)
    reports.send(replica.sequence)  # ready
    while replica.sequence < sequence:
        before = replica.sequence
        if replica.follow() > before:
            reports.send((replica.sequence, time.monotonic(), len(replica)))
        time.sleep(0.002)


def test_a_replica_in_another_process_follows(tmp_path, processes):
    reports, theirs = processes.Pipe(duplex=False)
    child = processes.Process(target=follow_and_report, args=(tmp_path, 300, theirs))
    child.start()
    theirs.close()
    index = IndexWriter.open(tmp_path, "model", D, [])
    committed, seen = {}, []
    assert reports.recv() == 0
    for number in range(1, 301):
        index.commit(batch_of(number))
        committed[number] = time.monotonic()
        if number % 100 == 0:
            index.compact()
    while not seen or seen[-1][0] < 300:
        seen.append(reports.recv())
    child.join()
    assert [size for _, _, size in seen] == [len(truth_after(sequence)) for sequence, _, _ in seen]
    assert [sequence for sequence, _, _ in seen] == sorted(sequence for sequence, _, _ in seen)
    lags = [1000 * (when - committed[sequence]) for sequence, when, _ in seen]
    print(f"{len(seen)} reports; from acknowledged to searchable {np.median(lags):.1f} ms, at most {max(lags):.1f} ms")
