"""Document stores against a dict, numpy and our own index: the same hits whatever the engine."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pgvector.psycopg import register_vector

from tests.index.test_live_index import FILTERS, OPERATIONS, D, added, matching, unit
from tests.support.stores import ENGINES, close_database, new_database, new_name, opener, postgres
from umarvel_ray.errors import UserError
from umarvel_ray.index import Add, Corpus, Delete, IndexWriter, LiveIndex
from umarvel_ray.index.copying import copy_embedded, copy_live
from umarvel_ray.index.log import NoSpace
from umarvel_ray.index.pgvector import PgvectorStore
from umarvel_ray.index.store import Unreachable, Unstorable
from umarvel_ray.inference.embeddings import embedding_table
from umarvel_ray.inference.shards import close_output, open_output, write_shard
from umarvel_ray.items.images import pictures_of
from umarvel_ray.recipe import Data

pytestmark = pytest.mark.filterwarnings("ignore:.*[Ll]ocal:UserWarning")  # Qdrant in a process has no indexes


@pytest.fixture(scope="module")
def url():
    with postgres() as url:
        yield url


@pytest.fixture(scope="module", params=ENGINES)
def open_store(request):
    return opener(request.param, lambda: request.getfixturevalue("url"))


def check(store, truth, query, k, filters):
    """`search` finds what numpy finds in the dict, and `documents` what was added."""
    hits = store.search(query, k, filters=filters)
    rows = matching(truth, filters=filters)
    best = sorted((float(row.vector @ query) for row in rows), reverse=True)[:k]
    np.testing.assert_allclose([hit.score for hit in hits], best, atol=1e-5)
    ids = [hit.document["id"] for hit in hits]
    assert len(set(ids)) == len(ids)
    for hit in hits:
        row = truth[hit.document["id"]]
        assert row in rows
        assert hit.score == pytest.approx(float(row.vector @ query), abs=1e-5)
        light = {name: value for name, value in row.document.items() if name not in ("image", "video")}
        assert hit.document == light | {"metadata": dict(row.metadata)}
        assert hit.pictures == len(pictures_of(row.image))
    gone = sorted({"a", "b0", "c", "d", "nobody"} - truth.keys())
    assert store.documents([*ids, *gone]) == [*(truth[id_].document for id_ in ids), *[None] * len(gone)]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    commits=st.lists(OPERATIONS, min_size=1, max_size=6),
    searches=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 20), FILTERS), min_size=3, max_size=3),
)
def test_a_store_is_a_dict(open_store, commits, searches):
    name, truth = new_name(), {}
    store = open_store(name, "model", D)
    for sequence, records in enumerate(commits):
        existed = []
        for record in records:
            existed.append(record.id in truth)
            truth.pop(record.id, None)
            if isinstance(record, Add):
                truth[record.id] = record
        before = store.sequence
        assert store.commit(records) == (before + bool(records), existed), sequence
        assert len(store) == len(truth)
        for seed, k, filters in searches:
            check(store, truth, unit(seed), k, filters)
    again = open_store(name, "model", D)
    assert (again.sequence, len(again), again.dimension) == (store.sequence, len(store), D)
    check(again, truth, unit(1), 20, {})


def test_the_hits_are_those_of_our_own_index(open_store, tmp_path):
    records = [added(f"n{seed}", seed) for seed in range(1200)]
    writer, store = IndexWriter.open(tmp_path, "model", D, []), open_store(new_name(), "model", D)
    writer.commit(records)
    store.commit(records)
    own = LiveIndex.open(tmp_path, "model", D)
    filters = [{}, {"language": ["en", "de"]}, {"year": [2024], "modality": ["text", "image"]}, {"source": []}]
    for seed, chosen, k in itertools.product(range(10**7, 10**7 + 5), filters, (1, 50)):
        wanted, found = (index.search(unit(seed), k, filters=chosen) for index in (own, store))
        assert [hit.document["id"] for hit in found] == [hit.document["id"] for hit in wanted]
        np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in wanted], atol=1e-5)


def test_odd_names_values_and_texts(open_store):
    store = open_store(new_name(), "model", D)
    odd = {"a.b[0]\"c'%s": "%(x)s", "ünï": "日本 🎉", "x" * 64: "é" * 512, "n": 2**63 - 1, "m": -(2**63)}
    row = Add("i/ö%s'\"\\", unit(1), "text", "it's {a} %s", text="🎉 \\ ' % {x}", metadata=odd)
    store.commit([row, added("other", 2)])
    for name, value in row.labels.items():
        [hit] = store.search(unit(3), 5, filters={name: [value, 7]})
        assert hit.document["id"] == row.id
        assert store.search(unit(3), 5, filters={name: [f"{value}~", "\0"]}) == []
    assert store.search(unit(3), 5, filters={"n": [str(2**63 - 1)], "nobody's\0": ["a"]}) == []
    assert store.documents([row.id, "nobody\0"]) == [row.document, None]
    assert store.commit([Delete("nobody\0"), Delete(row.id)]).existed == [False, True]


def test_several_writers_at_a_time(open_store):
    name = new_name()
    stores = [open_store(name, "model", D) for _ in range(4)]
    lock = threading.Lock()  # of Qdrant within a process, which has no server to order requests

    def write(number):
        done = []
        for step in range(10):
            records = [added("shared", 100 * number + step), added(f"{number}-{step}", step)]
            if isinstance(stores[0], PgvectorStore):
                done.append(stores[number].commit(records[:: (-1) ** number]).sequence)
            else:
                with lock:
                    done.append(stores[number].commit(records).sequence)
            assert stores[-1 - number].sequence >= done[-1]
            assert stores[-1 - number].documents([records[1].id]) == [records[1].document]
        return done

    with ThreadPoolExecutor(4) as pool:
        sequences = sorted(itertools.chain(*pool.map(write, range(4))))
    assert sequences == list(range(1, 41))
    assert len(stores[0]) == 41


def test_an_invalid_record_changes_nothing(open_store):
    store = open_store(new_name(), "model", D)
    for bad in (
        Add("b", unit(1)[:4], "text", "s"),
        Add("b", 2 * unit(1), "text", "s"),
        Add("b", unit(1), "text", "s", metadata={"id": "x"}),
    ):
        with pytest.raises(UserError, match="document 'b'"):
            store.commit([added("a", 1), bad])
    assert (len(store), store.sequence) == (0, 0)


def test_a_collection_of_another_model_or_of_something_else_is_refused(open_store):
    name = new_name()
    open_store(name, "model", D)
    for identity, dimension in (("other", D), ("model", D - 1)):
        with pytest.raises(UserError, match=f"{name} was embedded with another model .*dimension {D}, not") as error:
            open_store(name, identity, dimension)
        assert "\n" not in str(error.value)
    assert open_store(name, "model", 2 * D).dimension == D  # of a model whose vectors were truncated


class TestPostgres:
    """What only this engine has."""

    def test_another_table_is_left_alone(self, url):
        name = new_name()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE TABLE {name} (id int)")
        with pytest.raises(UserError, match="is not one of documents; name another one"):
            PgvectorStore(url, name, "model", D)

    def test_a_user_who_may_create_nothing_uses_what_is_there(self, url):
        name = new_name()
        with new_database(url) as (own, _):
            PgvectorStore(own, "documents", "model", D)
            with psycopg.connect(own, autocommit=True) as connection:
                connection.execute(f"CREATE ROLE {name} LOGIN")
                connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON documents, documents_state TO {name}")
            limited = own.replace("postgres:@", f"{name}:@")
            assert PgvectorStore(limited, "documents", "model", D).commit([added("a", 1)]) == (1, [False])
            with pytest.raises(UserError, match="the table more: permission denied"):
                PgvectorStore(limited, "more", "model", D)

    def test_a_table_in_a_schema(self, url):
        schema = new_name()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}")
        PgvectorStore(url, f"{schema}.d", "model", D).commit([added("a", 1)])
        assert len(PgvectorStore(url, f"{schema}.d", "model", D)) == 1

    @pytest.mark.parametrize(
        "bad",
        ["postgresql://me:s3cret@127.0.0.1:1/x", "postgresql//me:s3cret@h", "postgresql://me:s3cret@h/x?nonsense=1"],
    )
    def test_a_bad_url_is_one_line_without_its_password(self, bad):
        with pytest.raises(UserError) as error:
            PgvectorStore(bad, "documents", "model", D)
        assert str(error.value).startswith("store: ")
        assert "s3cret" not in "".join(map(repr, (error.value, error.value.__cause__)))
        assert error.value.__suppress_context__
        assert "\n" not in str(error.value)

    def test_the_password_may_come_from_the_environment(self, url, monkeypatch):
        with psycopg.connect(url) as connection:
            monkeypatch.setenv("PGHOST", connection.info.host)
        monkeypatch.setenv("PGUSER", "postgres")
        monkeypatch.setenv("PGPASSWORD", "s3cret")
        assert len(PgvectorStore("", new_name(), "model", D)) == 0

    def test_a_lost_connection_is_made_again_and_a_lost_server_is_told(self, url):
        with new_database(url) as (own, admin):
            store = PgvectorStore(own, "documents", "model", D)
            store.commit([added("a", 1)])
            close_database(admin, own, closed=True)
            for work in (lambda: store.search(unit(1), 1), lambda: store.commit([added("b", 2)]), lambda: len(store)):
                with pytest.raises(Unreachable) as error:
                    work()
                assert "\n" not in str(error.value)
            close_database(admin, own, closed=False)
            assert store.search(unit(1), 1)[0].document["id"] == "a"
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname IS NOT NULL AND "
                "pid <> pg_backend_pid()"
            )
            assert store.commit([added("b", 2)]) == (2, [False])

    def test_a_full_disk_changes_nothing(self, url):
        name = new_name()
        store = PgvectorStore(url, name, "model", D)
        store.commit([added("a", 1)])
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                f"CREATE FUNCTION full_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.id = 'c' THEN "
                "RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; "
                "END IF; RETURN NEW; END $$"
            )
            connection.execute(
                f"CREATE TRIGGER full_disk BEFORE INSERT ON {name} FOR EACH ROW EXECUTE FUNCTION full_{name}()"
            )
        with pytest.raises(NoSpace):
            store.commit([Delete("a"), added("b", 2), added("c", 3)])
        assert (len(store), store.sequence) == (1, 1)
        assert store.documents(["a", "b"]) == [added("a", 1).document, None]

    def test_what_it_cannot_hold_is_refused(self, url):
        store = PgvectorStore(url, new_name(), "model", D)
        with pytest.raises(Unstorable):
            store.commit([added("a", 1), Add("b", unit(1), "text", "s", text="\0")])
        for bad in (Add("b\0", unit(1), "text", "s"), Add("b", unit(1), "text", "s", metadata={"a": "\0"})):
            with pytest.raises(Unstorable):
                store.commit([bad])
        assert len(store) == 0

    def test_an_index_on_the_vectors_is_used_only_if_wanted(self, url):
        name, records = new_name(), [added(f"n{seed}", seed) for seed in range(2000)]
        exact = PgvectorStore(url, name, "model", D)
        exact.commit(records)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                f"CREATE INDEX ON {name} USING hnsw (vector vector_ip_ops) WITH (m = 2, ef_construction = 4)"
            )
            connection.execute(f"ANALYZE {name}")
            register_vector(connection)
        near, truth = PgvectorStore(url, name, "model", D, exact=False), {row.id: row for row in records}

        def scans():
            with psycopg.connect(url) as connection:
                connection.execute("SELECT pg_stat_force_next_flush()")
                query = "SELECT sum(idx_scan) FROM pg_stat_user_indexes WHERE relname = %s AND indexrelname ~ 'vector'"
                return connection.execute(query, [name]).fetchone()[0]

        for seed in range(5):
            check(exact, truth, unit(seed), 50, {})
            hits = near.search(unit(seed), 50)
            assert len(hits) == 50
            check(near, truth, unit(seed), 50, {"language": ["日本語"], "year": [-1]})  # too few are near: exact
        exact.close()
        near.close()
        assert scans() == 5


def corpus(folder: Path, count=40) -> tuple[Data, Path, dict[str, Add]]:
    """A data folder with further columns and pictures by path, its embeddings in three shards, and the truth."""
    columns = {
        "id": [f"d{n}" for n in range(count)],
        "text": [f"text {n}" if n % 3 else None for n in range(count)],
        "image": [f"pictures/{n}.png" if n % 2 else None for n in range(count)],
        "modality": [None] * count,
        "source": ["news", None] * (count // 2),
        "language": ["en", "de", None, "日本語"] * (count // 4),
        "year": pa.array([1990.0, None, 2000.5, 2024.0] * (count // 4)),
        "flag": [True, False] * (count // 2),
    }
    columns["text"][0] = "text 0"
    for n in range(0, count, 6):
        columns["text"][n] = f"text {n}"  # every document has a text or a picture
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "documents.parquet")
    pools = {"task": ["t"], "split": ["test"], "document_ids": [columns["id"]]}
    pq.write_table(pa.table(pools), folder / "pools.parquet")
    embeddings, order = folder / "embeddings", np.random.default_rng(0).permutation(count)
    for shard in open_output(embeddings, {"checkpoint": "model"}, 3):
        rows = order[shard::3].tolist()
        vectors = np.stack([unit(row) for row in rows])
        write_shard(embeddings, shard, embedding_table(rows, [f"d{row}" for row in rows], vectors), [])
    close_output(embeddings, count)
    truth = {}
    for n in range(count):
        year = {0: 1990, 3: 2024}.get(n % 4)
        labels = {"language": columns["language"][n], "year": year}
        text, image = columns["text"][n], columns["image"][n] and str(folder / columns["image"][n])
        modality = ",".join(name for name, given in (("image", image), ("text", text)) if given)
        metadata = {name: value for name, value in labels.items() if value is not None}
        truth[f"d{n}"] = Add(f"d{n}", unit(n), modality, columns["source"][n] or "", text, image, metadata=metadata)
    return Data(root=str(folder)), embeddings, truth


def test_an_index_is_copied_once_and_a_copy_is_resumed(open_store, tmp_path, monkeypatch, capsys):
    data, embeddings, truth = corpus(tmp_path / "data")
    live = tmp_path / "live"
    writer = IndexWriter.open(live, "model", D, list(truth))
    for records in ([added("d1", 77), Delete("d2"), added("n1", 5)], [Delete("n1"), added("n2", 6)]):
        writer.commit(records)
    writer.compact()
    writer.commit([added("n2", 8), added("n3", 9), Delete("d5")])
    monkeypatch.setattr("umarvel_ray.index.snapshot.ROWS", 7)

    store = open_store(new_name(), "model", D)
    commit = store.commit

    def failing(records):
        if store.sequence == 3:
            raise Unreachable("gone")
        return commit(records)

    monkeypatch.setattr(store, "commit", failing)
    with pytest.raises(Unreachable):
        copy_embedded(store, embeddings, data)
    assert len(store) == 21
    monkeypatch.setattr(store, "commit", commit)
    assert copy_embedded(store, embeddings, data) == 19
    assert len(store) == 40
    for filters in (
        {},
        {"language": ["en"]},
        {"year": [1990, 2024]},
        {"flag": [1]},
        {"source": [""], "modality": ["text"]},
    ):
        check(store, truth, unit(10**6), 40, filters)
    own = LiveIndex.open(None, "model", D, Corpus.open(embeddings, data))
    for filters in ({}, {"year": [1990]}, {"language": ["日本語"]}, {"flag": [1]}):
        wanted = [hit.document["id"] for hit in own.search(unit(9), 40, filters=filters)]
        assert [hit.document["id"] for hit in store.search(unit(9), 40, filters=filters)] == wanted

    copy_live(store, live, "model")
    truth |= {"d1": added("d1", 77), "n2": added("n2", 8), "n3": added("n3", 9)}
    del truth["d2"], truth["d5"]
    check(store, truth, unit(4), 60, {})
    assert len(store) == len(truth)
    sequence = store.sequence
    assert copy_live(store, live, "model") == 0
    assert store.sequence == sequence
    copy_embedded(store, embeddings, data)
    copy_live(store, live, "model")
    check(store, truth, unit(4), 60, {})
    assert f"copy {embeddings}: 40/40 doc · done" in capsys.readouterr().err


def test_what_cannot_be_copied_is_one_line(open_store, tmp_path):
    data, embeddings, _ = corpus(tmp_path / "data")
    with pytest.raises(UserError, match=f"vectors of {D} dimensions, the store of 16"):
        copy_embedded(open_store(new_name(), "model", 16), embeddings, data)
    with pytest.raises(UserError, match=r"no complete manifest\.json"):
        copy_embedded(open_store(new_name(), "model", D), tmp_path, data)
    IndexWriter.open(tmp_path / "live", "other", D, [])
    with pytest.raises(UserError, match="embedded with another model"):
        copy_live(open_store(new_name(), "model", D), tmp_path / "live", "model")
