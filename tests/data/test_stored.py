"""Tables on disk: rows by number equal pyarrow's own take, and a table is whole, checked and identified by content."""

from __future__ import annotations

import os
import pickle
import subprocess

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umarvel_ray.data.stored import BATCH_ROWS, StoredTable, is_stored, write_stored
from umarvel_ray.errors import UserError

ROWS = 3 * BATCH_ROWS + 17


def make_table(rows: int = ROWS) -> pa.Table:
    """A column of each type that tables are stored with, with nulls and empty values."""
    rng = np.random.default_rng(0)
    texts = [None if i % 7 == 0 else "ü" * (i % 5) + str(i) for i in range(rows)]
    return pa.table(
        {
            "id": pa.array([f"d{i}" for i in range(rows)]),
            "text": pa.array(texts),
            "image": pa.array([None if i % 3 else rng.bytes(i % 50) for i in range(rows)], pa.large_binary()),
            "path": pa.array(texts, pa.large_string()),
            "pictures": pa.array(
                [None if i % 5 == 0 else [b"x"] * (i % 3) for i in range(rows)], pa.list_(pa.binary())
            ),
            "positive_rows": pa.array([list(range(i % 4)) for i in range(rows)], pa.large_list(pa.int64())),
            "picture_key": pa.array(rng.integers(0, 2**64, rows, np.uint64)),
            "number": pa.array([None if i % 11 == 0 else i for i in range(rows)], pa.int64()),
            "flag": pa.array([None if i % 13 == 0 else i % 2 == 0 for i in range(rows)]),
            "nothing": pa.nulls(rows),
        }
    )


TABLE = make_table()


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> StoredTable:
    return write(tmp_path_factory.mktemp("stored") / "table.arrow", TABLE)


def write(path, table: pa.Table, batch_rows: int | None = None, check=None) -> StoredTable:
    return write_stored(path, table.schema, table.to_batches(batch_rows), check)


@given(st.lists(st.integers(0, ROWS - 1), max_size=40), st.booleans())
def test_rows_are_what_take_returns(stored, rows, run):
    rows = list(range(rows[0], min(rows[0] + 300, ROWS))) if run and rows else rows
    expected = TABLE.take(pa.array(rows, pa.int64()))
    assert stored.fetch(rows).equals(expected)
    assert stored.fetch(np.array(rows, np.int32), ["number", "id"]).equals(expected.select(["id", "number"]))
    assert stored.rows(rows, ["id", "pictures"]) == expected.select(["id", "pictures"]).to_pylist()


def test_a_table_is_what_was_written(stored):
    assert stored.num_rows == ROWS
    assert stored.schema == TABLE.schema
    for name in TABLE.column_names:
        assert stored.column(name).combine_chunks().equals(TABLE[name].combine_chunks()), name


def test_a_long_column_comes_in_the_order_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("umarvel_ray.data.stored.CHUNK_BATCHES", 2)
    assert write(tmp_path / "t.arrow", TABLE).column("id").to_pylist() == TABLE["id"].to_pylist()


def test_ids_are_found(stored):
    asked = ["d3", "unknown", f"d{ROWS - 1}", "d3", None]
    for kind in (pa.string(), pa.large_string()):
        assert stored.find(pa.array(asked, kind)).tolist() == [3, -1, ROWS - 1, 3, -1]
    assert stored.find(pa.chunked_array([["d0"], ["d9"]])).tolist() == [0, 9]


def test_a_process_gets_the_path_only(stored):
    stored.fetch([1])
    assert len(pickle.dumps(stored)) < 500
    assert pickle.loads(pickle.dumps(stored)).fetch([5]).equals(stored.fetch([5]))


@pytest.mark.parametrize("batch_rows", [1, 3, BATCH_ROWS - 1, BATCH_ROWS, 2 * BATCH_ROWS + 5])
def test_the_digest_is_the_same_however_the_rows_came(stored, tmp_path, batch_rows):
    again = write(tmp_path / "again.arrow", TABLE, batch_rows)
    assert again.digest == stored.digest
    assert again.fetch(range(ROWS)).equals(TABLE)


def test_what_lies_under_a_null_does_not_count(tmp_path):
    """Readers leave anything there."""
    digests = set()
    for number, hidden in enumerate((0, 7)):
        numbers = pa.Array.from_buffers(
            pa.int64(), 3, [pa.py_buffer(b"\x05"), pa.py_buffer(np.array([1, hidden, 3], np.int64))]
        )
        texts = pa.Array.from_buffers(
            pa.string(),
            3,
            [
                pa.py_buffer(b"\x05"),
                pa.py_buffer(np.array([0, 1, 1 + number, 2 + number], np.int32)),
                pa.py_buffer(b"a" + b"hidden"[:number] + b"b"),
            ],
        )
        table = pa.table({"id": texts, "number": numbers})
        digests.add(write(tmp_path / f"{number}.arrow", table).digest)
    assert len(digests) == 1


@pytest.mark.parametrize("column", TABLE.column_names[:-1])
def test_every_change_changes_the_digest(stored, tmp_path, column):
    values = TABLE[column].to_pylist()
    values[BATCH_ROWS + 1], values[BATCH_ROWS + 2] = values[BATCH_ROWS + 2], values[BATCH_ROWS + 1]
    changed = TABLE.set_column(
        TABLE.column_names.index(column), TABLE.schema.field(column), pa.array(values, TABLE.schema.field(column).type)
    )
    assert write(tmp_path / "a.arrow", changed).digest != stored.digest
    assert write(tmp_path / "b.arrow", TABLE.slice(0, ROWS - 1)).digest != stored.digest
    assert write(tmp_path / "c.arrow", TABLE.rename_columns(["ids", *TABLE.column_names[1:]])).digest != stored.digest


def test_an_empty_table_is_stored(tmp_path):
    table = write(tmp_path / "t.arrow", TABLE.slice(0, 0))
    assert (table.num_rows, table.fetch([]).num_rows, len(table.column("id"))) == (0, 0, 0)
    assert table.schema == TABLE.schema


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_an_interrupted_or_refused_table_leaves_nothing(tmp_path, error):
    def batches():
        yield from TABLE.to_batches()
        raise error("stop")

    def refuse(table):
        assert table.column("id").to_pylist() == TABLE["id"].to_pylist()
        assert table.rows([ROWS - 1], ["id"]) == [{"id": f"d{ROWS - 1}"}]
        raise error("wrong")

    path = tmp_path / "tables" / "t.arrow"
    for attempt in (lambda: write_stored(path, TABLE.schema, batches()), lambda: write(path, TABLE, check=refuse)):
        with pytest.raises(error):
            attempt()
        assert not is_stored(path)
        assert list(path.parent.iterdir()) == []
    write(path, TABLE)
    assert is_stored(path)


def test_a_table_without_its_facts_is_not_taken_for_whole(tmp_path):
    path = tmp_path / "t.arrow"
    write(path, TABLE)
    path.with_suffix(".json").unlink()
    assert not is_stored(path)


def test_a_file_that_another_node_cannot_see_is_one_line(tmp_path):
    table = pickle.loads(pickle.dumps(StoredTable(tmp_path / "t.arrow")))
    for use in (lambda: table.fetch([0]), lambda: table.column("id"), lambda: table.num_rows):
        with pytest.raises(UserError, match=r"t\.arrow: not found on this node; set data\.cache to a folder"):
            use()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(UserError, match=r"cannot write .*t.arrow: No space left on device; free space"):
            write(disk / "t.arrow", TABLE)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_more_text_than_32_bits_can_address(tmp_path):
    """Rows of a column of 2.5 GB, which is one batch again and again."""
    many = 40
    batch = pa.record_batch(
        {"id": [f"{i}" for i in range(BATCH_ROWS)], "text": [chr(97 + i % 26) * 250_000 for i in range(BATCH_ROWS)]}
    )
    table = write_stored(tmp_path / "t.arrow", batch.schema, (batch for _ in range(many)))
    assert os.path.getsize(table.path) > 2**31
    rows = [5, (many - 1) * BATCH_ROWS + 7, 17 * BATCH_ROWS, 5]
    assert table.rows(rows) == [batch.slice(row % BATCH_ROWS, 1).to_pylist()[0] for row in rows]
    assert len(table.column("id")) == many * BATCH_ROWS


def test_large_rows_share_smaller_batches(tmp_path):
    """A batch is what a reader may have to hold; row numbers do not depend on its size."""
    values = [bytes([number]) * (1 << 20) for number in range(40)]
    table = pa.table({"id": [f"d{number}" for number in range(40)], "image": pa.array(values, pa.large_binary())})
    stored = write_stored(tmp_path / "large.arrow", table.schema, table.to_batches(max_chunksize=7))
    with pa.memory_map(stored.path) as file:
        reader = pa.ipc.open_file(file)
        sizes = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
    assert set(sizes[:-1]) == {15}
    assert sum(sizes) == 40
    assert [row["image"][0] for row in stored.rows([39, 0, 14, 15, 16, 29, 30])] == [39, 0, 14, 15, 16, 29, 30]
    again = write_stored(tmp_path / "again.arrow", table.schema, table.to_batches(max_chunksize=40))
    assert again.digest == stored.digest
    empty = table.schema.empty_table().to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
    batches = [*empty, *table.to_batches(max_chunksize=7)]
    assert write_stored(tmp_path / "with_empty.arrow", table.schema, batches).digest == stored.digest
