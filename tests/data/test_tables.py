"""Reading Parquet and M-BEIR folders, and one line for each error in them."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.small_dataset import document_rows, query_rows
from umarvel_ray.data.content import content_key, picture_key
from umarvel_ray.data.dataset import Dataset, item_of
from umarvel_ray.data.parquet import ParquetFolder
from umarvel_ray.data.tables import open_dataset, user_cache
from umarvel_ray.errors import UserError
from umarvel_ray.recipe import Data

DOCUMENTS = [
    {"id": "d1", "text": "a fox", "image": None, "modality": "text", "source": "s"},
    {"id": "d2", "text": None, "image": b"png", "modality": "image", "source": "s"},
    {"id": "d3", "text": "boats", "image": b"png", "modality": "image,text", "source": "s"},
]
QUERIES = [
    {
        "id": f"q{i}",
        "text": "what?",
        "image": None,
        "modality": "text",
        "source": "s",
        "instruction": "Find it.",
        "positive_ids": positives,
        "task": "s_task0",
    }
    for i, positives in enumerate((["d1"], ["d2", "d3"]))
]
POOLS = [
    {"task": "s_task0", "split": "test", "document_ids": ["d2", "d1"]},
    {"task": "s_task1", "split": "test", "document_ids": ["d3", "d2"]},
    {"task": "s_task0", "split": "train", "document_ids": ["d1"]},
]


def save(folder: Path, documents=DOCUMENTS, test=QUERIES, pools=POOLS) -> None:
    """Write a folder; a table is rows or an Arrow table."""
    for name, rows in (("documents", documents), ("test", test), ("pools", pools)):
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
        pq.write_table(table, folder / f"{name}.parquet")


def open_saved(folder: Path) -> Dataset:
    return open_dataset(Data(root=str(folder)), folder / "tables")


@pytest.fixture
def write(tmp_path):
    """Write a folder, with some tables changed, and open it."""

    def _write(**tables) -> Dataset:
        save(tmp_path, **tables)
        return open_saved(tmp_path)

    return _write


def ids_of(data: Dataset, rows) -> list[str]:
    return data.document_ids.take(pa.array(rows)).to_pylist()


def test_a_valid_folder_reads_as_written(write):
    data = write()
    data.validate("test")
    keys = [{"content_key": content_key(row), "picture_key": picture_key(row)} for row in DOCUMENTS]
    assert document_rows(data) == [row | key for row, key in zip(DOCUMENTS, keys, strict=True)]
    rows = [{key: row[key] for key in QUERIES[0]} for row in query_rows(data, "test")]
    assert rows == QUERIES
    assert data.queries("test").ids() == ["q0", "q1"]
    assert data.tasks("test") == ["s_task0", "s_task1"]
    assert data.pool("s_task0", "test").tolist() == [1, 0]
    assert data.global_pool("test").tolist() == [0, 1, 2]
    assert data.global_pool("train").tolist() == [0]


def test_a_folder_named_like_a_partition_is_a_folder(write, tmp_path):
    """Elsewhere the rows of a file in `text=other/task=1` have columns of these names and values."""
    folder = tmp_path / "text=other" / "task=1"
    folder.mkdir(parents=True)
    save(folder)
    moved, data = open_saved(folder), write()
    assert document_rows(moved) == document_rows(data)
    assert query_rows(moved, "test") == query_rows(data, "test")
    assert moved.queries("test").tasks == data.queries("test").tasks


def test_an_item_is_the_row_without_nulls_and_other_columns():
    assert item_of(DOCUMENTS[0]) == {"text": "a fox"}
    assert item_of(DOCUMENTS[2]) == {"text": "boats", "image": b"png"}
    assert item_of(QUERIES[0]) == {"text": "what?", "instruction": "Find it."}


TEXT_TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "large dictionary": pa.dictionary(pa.int8(), pa.large_string()),
}


def retyped(rows: list[dict], text: pa.DataType, media: pa.DataType, nulls: bool = False) -> pa.Table:
    """Rows as a table with these types; `nulls`: columns without values have none."""
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        flat = pa.list_(text) if name.endswith("_ids") else media if name == "image" else text
        empty = nulls and not any(value is not None for value in values)
        columns[name] = (
            pa.nulls(len(rows))
            if empty
            else pa.array(values, pa.string()).cast(flat)
            if (isinstance(values[0], str) and pa.types.is_dictionary(flat))
            else pa.array(values, flat)
        )
    return pa.table(columns)


@pytest.mark.parametrize("nulls", [False, True])
@pytest.mark.parametrize("kind", TEXT_TYPES.values(), ids=TEXT_TYPES)
def test_the_type_of_text_makes_no_difference(tmp_path, kind, nulls):
    paths = ["img/a.png", "/else/b.png", "data:image/png;base64,AA", None, ""]
    documents = [{**DOCUMENTS[0], "id": f"d{i}", "image": path} for i, path in enumerate(paths, 1)]
    save(
        tmp_path,
        documents=retyped(documents, pa.string(), pa.string()),
        test=retyped(QUERIES, pa.string(), pa.string()),
    )
    plain = open_saved(tmp_path)
    lists = kind if not pa.types.is_dictionary(kind) else pa.string()
    pools = pa.table(
        {
            "task": pa.array([row["task"] for row in POOLS], kind),
            "split": pa.array([row["split"] for row in POOLS], kind),
            "document_ids": pa.array([row["document_ids"] for row in POOLS], pa.large_list(lists)),
        }
    )
    save(tmp_path, retyped(documents, kind, kind), retyped(QUERIES, kind, kind, nulls), pools)
    data = open_saved(tmp_path)
    assert [row["image"] for row in document_rows(data)] == [str(tmp_path / "img/a.png"), *paths[1:3], None, None]
    assert data.documents.digest == plain.documents.digest
    assert data.queries("test").digest == plain.queries("test").digest
    assert data.digest_of_pools("test") == plain.digest_of_pools("test")
    data.validate("test")


@pytest.mark.parametrize(
    "kind", [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary()), pa.binary(3)]
)
def test_the_type_of_encoded_bytes_makes_no_difference(tmp_path, kind):
    digests = set()
    for media in (pa.binary(), kind):
        save(tmp_path, documents=retyped(DOCUMENTS, pa.string(), media))
        data = open_saved(tmp_path)
        digests.add(data.documents.digest)
    assert [row["image"] for row in document_rows(data)] == [None, b"png", b"png"]
    assert len(digests) == 1


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_a_row_may_have_several_pictures(write, tmp_path, lists, kind):
    given = [["a.png", "/b.png"], [], None, ["c.png"]]
    if kind != pa.binary():  # as `fillna("")` leaves them
        given = [["a.png", "", "/b.png"], [""], None, [None, "c.png"]]
    rows = [{**DOCUMENTS[0], "id": f"d{i}"} for i in range(1, 5)]
    table = pa.Table.from_pylist(rows)
    data = write(documents=table.set_column(2, "image", pa.array(given, lists(kind))))
    expected = [[str(tmp_path / "a.png"), "/b.png"], None, None, [str(tmp_path / "c.png")]]
    if kind == pa.binary():
        expected = [[b"a.png", b"/b.png"], None, None, [b"c.png"]]
    stored = document_rows(data)
    assert [row["image"] for row in stored] == expected
    assert [row["picture_key"] for row in stored] == [picture_key(row) for row in stored]
    assert [row["content_key"] for row in stored] == [content_key(row) for row in stored]


def test_what_a_row_lacks_is_told_from_what_it_has(write):
    """A modality is what the row shows, a source the empty one: searches print them and filter by them."""
    bare = [{**row, "modality": None, "source": None} for row in [*DOCUMENTS, {**DOCUMENTS[1], "id": "d4", "text": ""}]]
    columns = [(row["modality"], row["source"]) for row in document_rows(write(documents=bare))]
    assert columns == [("text", ""), ("image", ""), ("image,text", ""), ("image", "")]
    nothing = [{**row, "modality": None, "text": None, "image": None} for row in DOCUMENTS]
    assert [row["modality"] for row in document_rows(write(documents=nothing))] == ["", "", ""]
    film = pa.Table.from_pylist(bare).append_column("video", pa.array([None, b"mp4", None, None]))
    assert [row["modality"] for row in document_rows(write(documents=film))][1] == "image,video"


def test_repeats_in_a_pool_are_counted_once_and_said(write, capsys):
    data = write(pools=[{**POOLS[0], "document_ids": ["d2", "d1", "d2", "d2"]}])
    assert data.pool("s_task0", "test").tolist() == [1, 0]
    assert "pools, task 's_task0', split 'test': 2 repeated documents are counted once" in capsys.readouterr().out


def test_positives_outside_their_pool_are_counted_and_said(write, capsys):
    """`test` asks for d1, and for d2 and d3, of which the pool has no d3."""
    write().validate("test")
    assert "test: 1 of 2 queries of task 's_task0' have a positive outside their pool" in capsys.readouterr().out
    write(pools=[{**POOLS[0], "document_ids": ["d1", "d2", "d3"]}]).validate("test")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("documents", [pa.int64(), pa.uint8(), pa.string()])
@pytest.mark.parametrize("others", [pa.int32(), pa.string()])
def test_integer_ids_are_their_digits(write, documents, others):
    def column(values, kind):
        return pa.array(values, pa.int64()).cast(kind)

    ids = pa.Table.from_pylist(DOCUMENTS).set_column(0, "id", column([7, 8, 90], documents))
    lists = pa.ListArray.from_arrays([0, 1, 3], column([7, 8, 90], others))
    queries = pa.Table.from_pylist(QUERIES).set_column(0, "id", column([1, 2], documents))
    queries = queries.set_column(queries.column_names.index("positive_ids"), "positive_ids", lists)
    pools = pa.table({"task": ["s_task0"], "split": ["test"], "document_ids": lists.slice(1, 1)})
    data = write(documents=ids, test=queries, pools=pools)
    data.validate("test")
    assert data.document_ids.to_pylist() == ["7", "8", "90"]
    assert [row["positive_ids"] for row in query_rows(data, "test")] == [["7"], ["8", "90"]]
    assert ids_of(data, data.pool("s_task0", "test")) == ["8", "90"]
    assert data.queries("test").ids() == ["1", "2"]


def test_other_columns_are_kept_as_they_are(write):
    rows = document_rows(write(documents=[{**row, "more": {"a": 1.5}, "content_key": "mine"} for row in DOCUMENTS]))
    assert rows[0]["more"] == {"a": 1.5}
    assert isinstance(rows[0]["content_key"], int), "a name of our own is not the user's"


def test_a_second_opening_reads_no_file_of_the_folder(write, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("read again")

    first = write()
    first.validate("test")
    monkeypatch.setattr(pq, "ParquetFile", fail)
    monkeypatch.setattr("umarvel_ray.data.writing.write_stored", fail)
    again = open_saved(tmp_path)
    again.validate("test")
    assert document_rows(again) == document_rows(first)
    assert again.queries("test").digest == first.queries("test").digest
    assert again.digest_of_pools("test") == first.digest_of_pools("test")


@pytest.mark.parametrize("name", ["documents", "pools", "test"])
def test_a_changed_file_is_converted_again(write, tmp_path, name):
    path = tmp_path / f"{name}.parquet"
    write().validate("test")
    if name == "documents":
        pq.write_table(pa.Table.from_pylist([DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]]), path)
        assert open_saved(tmp_path).document_ids.to_pylist() == ["d2", "d1", "d3"]
        assert open_saved(tmp_path).pool("s_task0", "test").tolist() == [0, 1], "pools follow the documents' rows"
        assert open_saved(tmp_path).queries("test").positives.at(0).tolist() == [1]
    written = set((tmp_path / "tables").glob(f"{name}-*.arrow"))
    os.utime(path, ns=(1, 1))
    open_saved(tmp_path).validate("test")
    assert set((tmp_path / "tables").glob(f"{name}-*.arrow")) > written


def test_a_file_with_its_old_size_and_time_is_still_noticed(write, tmp_path):
    before = write().queries("test").digest
    path = tmp_path / "test.parquet"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index("text"), "text", [["what!", "what?"]]), path)
    os.utime(path, ns=times)
    assert open_saved(tmp_path).queries("test").digest != before


def test_a_file_that_changes_while_it_is_read_is_not_kept(write, tmp_path, monkeypatch):
    write()
    read = ParquetFolder._table

    def replaced(self, name, needed, columns):
        found = read(self, name, needed, columns)
        if name == "test":
            save(tmp_path, test=QUERIES[::-1])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ParquetFolder, "_table", replaced)
        with pytest.raises(UserError, match=r"test.parquet or a file beside it changed while 'test' was read"):
            open_saved(tmp_path).queries("test")
    data = open_saved(tmp_path)
    queries = data.queries("test")
    assert queries.ids() == ["q1", "q0"]
    assert [ids_of(data, own) for own in queries.positives.lists()] == [["d2", "d3"], ["d1"]]


@pytest.mark.parametrize("harm", ["halved", "without facts", "empty facts"])
def test_a_damaged_table_is_converted_again(write, tmp_path, harm):
    digest = write().documents.digest
    [table] = (tmp_path / "tables").glob("documents-*.arrow")
    facts = table.with_suffix(".json")
    if harm == "halved":
        table.write_bytes(table.read_bytes()[: table.stat().st_size // 2])
    elif harm == "without facts":
        facts.unlink()
    else:
        facts.write_text("")
    data = open_saved(tmp_path)
    assert data.documents.digest == digest
    assert [row["id"] for row in document_rows(data)] == ["d1", "d2", "d3"]


def test_columns_that_nobody_asked_for_do_no_harm(write):
    views = pa.array(["one", None, "a string of more than twelve letters"], pa.string_view())
    data = write(documents=typed(DOCUMENTS).append_column("note", views))
    assert data.documents.column("note").to_pylist() == views.to_pylist()


def test_a_path_that_looks_like_a_uri_is_a_path(write, tmp_path):
    data = write(documents=typed(DOCUMENTS, image=["img:1.png", "https://a/b.png", "data:image/png;base64,AA"]))
    found = data.documents.column("image").to_pylist()
    assert found == [f"{tmp_path}/img:1.png", "https://a/b.png", "data:image/png;base64,AA"]


def test_tables_are_kept_where_the_recipe_says(tmp_path):
    save(tmp_path)
    for data, given, folder in (
        (Data(root=str(tmp_path), cache=str(tmp_path / "a")), tmp_path / "b", tmp_path / "a"),
        (Data(root=str(tmp_path)), tmp_path / "b", tmp_path / "b"),
        (Data(root=str(tmp_path)), None, user_cache()),
    ):
        assert Path(open_dataset(data, given).documents.path).parent == folder


def test_a_conversion_holds_few_rows_at_once(tmp_path, monkeypatch):
    """Not a whole row group: it may hold all of a folder's pictures."""
    monkeypatch.setattr("umarvel_ray.data.parquet.READ_BYTES", 2 << 20)
    blobs = [os.urandom(100_000) for _ in range(4)]
    rows = [{**DOCUMENTS[0], "id": f"d{i}", "image": blobs[i % 4]} for i in range(500)]
    path = tmp_path / "documents.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, use_dictionary=False, write_batch_size=8)
    assert pq.read_metadata(path).num_row_groups == 1
    del rows
    before, held, sizes = pa.total_allocated_bytes(), [], []
    for batch in ParquetFolder(tmp_path)._batches("documents", ("id",)):
        sizes.append(batch.num_rows)
        held.append(pa.total_allocated_bytes() - before)
    assert sum(sizes) == 500
    assert max(sizes) <= 20
    assert max(held) < 20e6 < path.stat().st_size / 2


def without(rows: list[dict], column: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key != column} for row in rows]


def typed(rows: list[dict], **columns) -> pa.Table:
    """Rows as a table with some columns of other types."""
    table = pa.Table.from_pylist(rows)
    for name, values in columns.items():
        values = values if isinstance(values, pa.Array) else pa.array(values)
        table = table.set_column(table.column_names.index(name), name, values)
    return table


def not_utf8(rows: int) -> pa.Array:
    wrong = pa.array([b"caf\xe9"] * rows, pa.binary())
    return pa.Array.from_buffers(pa.string(), rows, wrong.buffers())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": [*DOCUMENTS, DOCUMENTS[1]]}, r"documents: id 'd2' occurs twice"),
        ({"documents": [*DOCUMENTS, {**DOCUMENTS[0], "id": None}]}, r"documents: row 3 has no id"),
        ({"documents": without(DOCUMENTS, "modality")}, r"documents.parquet: column 'modality' is missing"),
        ({"test": without(QUERIES, "positive_ids")}, r"test.parquet: column 'positive_ids' is missing"),
        ({"test": [QUERIES[0], QUERIES[0]]}, r"test: id 'q0' occurs twice"),
        ({"test": [QUERIES[0], {**QUERIES[1], "positive_ids": []}]}, r"test, row 1: query 'q1' has no positive"),
        ({"test": [QUERIES[0], {**QUERIES[1], "positive_ids": None}]}, r"test, row 1: query 'q1' has no positive"),
        (
            {"test": [QUERIES[0], {**QUERIES[1], "positive_ids": ["d1", "d9"]}]},
            r"test, row 1: query 'q1' names the unknown document 'd9'",
        ),
        (
            {"pools": [POOLS[0], {**POOLS[1], "document_ids": ["d1", "d8"]}]},
            r"pools, task 's_task1', split 'test': unknown document 'd8'",
        ),
        ({"documents": []}, r"documents.parquet: column 'id' is missing"),
        (
            {"documents": typed(DOCUMENTS).append_column("text", pa.array(["a"] * 3))},
            r"documents.parquet: column 'text' occurs twice; keep one",
        ),
        (
            {"documents": typed(DOCUMENTS).append_column("instruction", pa.array([None, "", "find"]))},
            r"documents: row 2 has an instruction, which only queries carry; drop the column",
        ),
        ({"documents": typed(DOCUMENTS).slice(0, 0)}, r"documents: the table has no rows"),
        ({"documents": typed(DOCUMENTS, id=[1.0, 2.0, 3.0])}, r"documents: column 'id' holds double, not text"),
        ({"documents": typed(DOCUMENTS, text=[1.5, None, 2.0])}, r"documents: column 'text' holds double, not text"),
        ({"documents": typed(DOCUMENTS, image=[1, 2, 3])}, r"documents: column 'image' holds int64, not encoded bytes"),
        (
            {"documents": typed(DOCUMENTS, image=[{"bytes": b"a"}] * 3)},
            r"documents: column 'image' holds struct<bytes: binary>, not encoded bytes, paths",
        ),
        ({"documents": typed(DOCUMENTS, text=not_utf8(3))}, r"documents: column 'text' holds text that is not UTF-8"),
        ({"test": typed(QUERIES, id=[True, False])}, r"test: column 'id' holds bool, not text"),
        ({"test": typed(QUERIES, task=[None, "s_task0"])}, r"test: row 0 has no task"),
        ({"test": typed(QUERIES, task=["s_task0", " "])}, r"test: a task's name is empty; give it one"),
        ({"test": typed(QUERIES, task=["s_task0", "a\nb"])}, r"test: a task's name has several lines: 'a.{2}b'"),
        ({"test": typed(QUERIES, task=["average", "a"])}, r"test: a task is called 'average'"),
        ({"pools": typed(POOLS, task=["", "a", "b"])}, r"pools: a task's name is empty; give it one"),
        ({"test": typed(QUERIES, id=["q0", " "])}, r"test: the id of row 1 is empty; give it one"),
        ({"documents": typed(DOCUMENTS, id=["", "d2", "d3"])}, r"documents: the id of row 0 is empty; give it one"),
        ({"test": typed(QUERIES, positive_ids=["d1", "d2"])}, r"test: column 'positive_ids' holds string, not lists"),
        ({"test": typed(QUERIES, positive_ids=[[1.0], [2.0]])}, r"test: column 'positive_ids' holds double, not text"),
        ({"test": typed(QUERIES, positive_ids=pa.nulls(2))}, r"test, row 0: query 'q0' has no positive"),
        (
            {"test": typed(QUERIES, positive_ids=[["d1", None], ["d2"]])},
            r"query 'q0' names the unknown document 'None'",
        ),
        ({"pools": typed(POOLS, document_ids=[[1.0]] * 3)}, r"pools: column 'document_ids' holds double, not text"),
        ({"pools": typed(POOLS, split=[1.0] * 3)}, r"pools: column 'split' holds double, not text"),
        ({"pools": typed(POOLS, task=[None] * 3)}, r"pools: row 0 has no task; give it one"),
        ({"pools": [*POOLS, POOLS[0]]}, r"pools: task 's_task0' has 2 pools in split 'test'; keep one"),
        (
            {"pools": [POOLS[0], {**POOLS[1], "document_ids": []}]},
            r"the pool of task 's_task1', split 'test', is empty",
        ),
    ],
)
def test_errors_name_the_table_and_row(write, tmp_path, change, message):
    """On every opening: nothing of a wrong table is kept."""
    for open_ in (lambda: write(**change), lambda: open_saved(tmp_path)):
        with pytest.raises(UserError, match=message) as error:
            open_().validate("test")
        assert str(error.value).startswith(str(tmp_path))
        assert "\n" not in str(error.value)


def test_an_empty_picture_is_none(write):
    pictures = typed(DOCUMENTS, image=[b"", b"png", b""], modality=pa.nulls(3, pa.string()))
    rows = document_rows(write(documents=pictures))
    assert [(row["image"], row["modality"]) for row in rows] == [(None, "text"), (b"png", "image"), (None, "text")]


def test_missing_folders_tables_and_pools_are_named(write, tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; set data.root"):
        open_dataset(Data(root=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"documents.parquet: not found"):
        open_dataset(Data(root=str(tmp_path)))
    data = write()
    with pytest.raises(UserError, match=r"validation.parquet: not found"):
        data.queries("validation")
    with pytest.raises(UserError, match="no pool for task 's_task9' in split 'test'"):
        data.pool("s_task9", "test")
    (tmp_path / "documents.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"documents.parquet: not a readable Parquet file"):
        open_dataset(Data(root=str(tmp_path)))


def test_a_file_that_breaks_off_is_named(tmp_path):
    save(tmp_path, documents=[{**DOCUMENTS[0], "id": f"d{i}", "text": os.urandom(50).hex()} for i in range(9999)])
    path = tmp_path / "documents.parquet"
    content = bytearray(path.read_bytes())
    content[200_000:300_000] = bytes(100_000)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"documents.parquet: not a readable Parquet file") as error:
        open_saved(tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.glob("tables/*")) == []


def document(did: str, text: str | None, image: str | None, modality: str) -> dict:
    return {"did": did, "txt": text, "img_path": image, "modality": modality, "src_content": None}


def query(qid: str, text: str | None, image: str | None, modality: str, positives: list[str], task: int) -> dict:
    return {
        "qid": qid,
        "query_txt": text,
        "query_img_path": image,
        "query_modality": modality,
        "query_src_content": '{"id": "7"}',
        "pos_cand_list": positives,
        "neg_cand_list": [],
        "task_id": task,
    }


@pytest.fixture
def mbeir(tmp_path):
    """A folder in M-BEIR's layout: CIRR (8) task 7 and MSCOCO (9) task 0, test and train."""

    def lines(path: str, rows: list[dict]) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    cirr = [document("8:1", None, "mbeir_images/a.jpg", "image"), document("8:2", None, "mbeir_images/b.jpg", "image")]
    coco = [document("9:1", None, "mbeir_images/c.jpg", "image")]
    train = [document("9:5", None, "mbeir_images/d.jpg", "image"), coco[0]]
    lines("cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl", cirr)
    lines("cand_pool/local/mbeir_mscoco_task0_test_cand_pool.jsonl", coco)
    lines("cand_pool/global/mbeir_union_test_cand_pool.jsonl", cirr + coco)
    lines("cand_pool/global/mbeir_union_train_cand_pool.jsonl", train)
    lines(
        "query/test/mbeir_cirr_task7_test.jsonl",
        [query("8:1", "Show three.", "mbeir_images/q.jpg", "image,text", ["8:9"], 7)],
    )
    lines("query/test/mbeir_mscoco_task0_test.jsonl", [query("9:1", "A kitchen.", None, "text", ["9:1"], 0)])
    lines("query/union_train/mbeir_union_up_train.jsonl", [query("9:3", "A cat.", None, "text", ["9:5"], 0)])
    qrels = tmp_path / "qrels/test/mbeir_cirr_task7_test_qrels.txt"
    qrels.parent.mkdir(parents=True)
    qrels.write_text("8:1 0 8:2 1 7\n8:1 0 8:1 0 7\n")
    table = tmp_path / "instructions/query_instructions.tsv"
    table.parent.mkdir()
    table.write_text(
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\n"
        "text\timage\tMSCOCO\t9\tFind me.\tShow me.\n"
        "image,text\timage\tCIRR\t8\tChange it.\t\n"
    )
    return tmp_path


def open_mbeir(root) -> Dataset:
    return open_dataset(Data(root=str(root), format="mbeir"), root / "tables")


def pools_of(data: Dataset, split: str) -> dict[str, list[str]]:
    """The ids of each task's pool."""
    return {task: ids_of(data, data.pool(task, split)) for task in data.tasks(split)}


def test_mbeir_reads_as_published(mbeir):
    data = open_mbeir(mbeir)
    assert data.document_ids.to_pylist() == ["9:5", "9:1", "8:1", "8:2"]
    document = document_rows(data)[3]
    assert {key: document[key] for key in DOCUMENTS[0]} == {
        "id": "8:2",
        "text": None,
        "image": str(mbeir / "mbeir_images/b.jpg"),
        "modality": "image",
        "source": "cirr",
    }
    assert document["content_key"] == content_key(document) == document["picture_key"]
    assert pools_of(data, "test") == {"cirr_task7": ["8:1", "8:2"], "mscoco_task0": ["9:1"]}
    assert data.tasks("validation") == ["cirr_task7"]
    assert ids_of(data, data.global_pool("train")) == ["9:5", "9:1"]
    data.validate("test")
    data.validate("train")
    cirr, coco = query_rows(data, "test")
    assert {key: cirr[key] for key in QUERIES[0]} == {
        "id": "8:1",
        "text": "Show three.",
        "image": str(mbeir / "mbeir_images/q.jpg"),
        "modality": "image,text",
        "source": "cirr",
        "instruction": "Change it.",
        "positive_ids": ["8:2"],  # the qrels', relevance above 0
        "task": "cirr_task7",
    }
    assert cirr["picture_key"] == picture_key(cirr)
    assert coco["positive_ids"] == ["9:1"]
    assert coco["instruction"] in ("Find me.", "Show me.")
    assert [row["task"] for row in query_rows(data, "train")] == ["mscoco_task0"]


def test_mbeirs_unions_are_read_where_there_are_no_local_pools(mbeir):
    """A union of validation or test repeats the local pools of its split, if there are any."""
    union = mbeir / "cand_pool/global/mbeir_union_test_cand_pool.jsonl"
    more = json.dumps(document("9:77", None, "mbeir_images/e.jpg", "image")) + "\n"
    union.write_text(union.read_text() + more)
    assert "9:77" not in open_mbeir(mbeir).document_ids.to_pylist()
    for file in (mbeir / "cand_pool/local").iterdir():
        file.unlink()
    data = open_mbeir(mbeir)
    assert data.document_ids.to_pylist() == ["8:1", "8:2", "9:1", "9:77", "9:5"]
    assert data.tasks("test") == []
    assert data.queries("test").positives.at(0).tolist() == [data.document_ids.to_pylist().index("8:2")]


def test_mbeirs_documents_are_the_first_lines_with_their_ids(mbeir, monkeypatch):
    """However many lines are parsed at once: local pools share documents, and a pool may repeat one."""
    monkeypatch.setattr("umarvel_ray.data.mbeir.BLOCK", 400)
    for number in range(3):
        rows = [document(f"5:{i}", f"{number} {i}", None, "text") for i in range(number * 30, number * 30 + 50)]
        lines = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0]])
        (mbeir / f"cand_pool/local/mbeir_oven_task{number}_test_cand_pool.jsonl").write_text(lines)
    data = open_mbeir(mbeir)
    texts = {row["id"]: row["text"] for row in document_rows(data) if row["id"].startswith("5:")}
    assert texts == {f"5:{i}": f"{max(0, i - 20) // 30 if i < 110 else 2} {i}" for i in range(110)}
    for number in range(3):
        expected = [f"5:{i}" for i in range(number * 30, number * 30 + 50)]
        assert pools_of(data, "test")[f"oven_task{number}"] == expected


def test_a_new_file_of_qrels_is_read(mbeir):
    assert query_rows(open_mbeir(mbeir), "test")[1]["positive_ids"] == ["9:1"]
    (mbeir / "qrels/test/mbeir_mscoco_task0_test_qrels.txt").write_text("\ufeff9:1 0 8:1 1 0\n", encoding="utf-8")
    assert query_rows(open_mbeir(mbeir), "test")[1]["positive_ids"] == ["8:1"]


def test_mbeirs_training_union_is_split_into_tasks(mbeir):
    kinds = [("5:1", "text"), ("5:2", "image,text"), ("6:1", "text"), ("9:5", "image"), ("9:6", "text")]
    union = mbeir / "cand_pool/global/mbeir_union_train_cand_pool.jsonl"
    union.write_text("".join(json.dumps(document(did, "A.", None, kind)) + "\n" for did, kind in kinds))
    train = mbeir / "query/union_train/mbeir_union_up_train.jsonl"
    train.write_text(train.read_text() * 2 + train.read_text().replace("9:3", "9:4") + train.read_text())
    data = open_mbeir(mbeir)
    assert pools_of(data, "train") == {
        "mscoco_task0": ["9:5"],
        "mscoco_task3": ["9:6"],
        "oven_task6": ["5:1", "6:1"],
        "oven_task8": ["5:2"],
        "infoseek_task6": ["5:1", "6:1"],
        "infoseek_task8": ["5:2"],
    }
    assert data.queries("train").ids() == ["9:3", "9:3#2", "9:4", "9:3#3"]
    data.validate("train")


def test_other_pairs_use_mbeirs_layout(mbeir):
    (mbeir / "query/nli").mkdir()
    (mbeir / "query/nli/pairs.jsonl").write_text(json.dumps(query("10:1", "A cat.", None, "text", ["10:1"], 1)) + "\n")
    pool = mbeir / "cand_pool/global/mbeir_nli_cand_pool.jsonl"
    pool.write_text(json.dumps(document("10:1", "An animal.", None, "text")) + "\n")
    data = open_mbeir(mbeir)
    data.validate("nli")
    [row] = query_rows(data, "nli")
    assert (row["task"], row["source"], row["instruction"]) == ("nli_task1", "nli", None)
    assert "10:1" in data.document_ids.to_pylist()
    assert "10:1" not in ids_of(data, [*data.global_pool("train"), *data.global_pool("test")])
    with pytest.raises(UserError, match=r"query/cc3m: no \*.jsonl for the query table 'cc3m'"):
        data.queries("cc3m")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("qrels/test/mbeir_cirr_task7_test_qrels.txt", "8:1 0\n", r"qrels.txt: line 1: expected 'qid 0 did"),
        ("qrels/test/mbeir_cirr_task7_test_qrels.txt", "8:1 0 8:77 1 7\n", r"names the unknown document '8:77'"),
        ("query/test/mbeir_cirr_task7_test.jsonl", "{not json\n", r"task7_test.jsonl: not M-BEIR JSON lines"),
        ("query/test/mbeir_cirr_task7_test.jsonl", '{"query_txt": "a"}\n', r"a line has no 'qid'"),
        ("query/test/mbeir_cirr_task7_test.jsonl", '{"qid": "77:1"}\n', r"test.jsonl: id '77:1' is not DATASET:NUMBER"),
        ("instructions/query_instructions.tsv", "h\ntext\timage\n", r"instructions.tsv: line 2: expected"),
        ("cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl", "", r"cand_pool.jsonl"),
        ("cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl", '{"did": 7}\n', r"cand_pool.jsonl: not M-BEIR JSON lines"),
        ("cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl", '{"did": "x"}\n', r"id 'x' is not DATASET:NUMBER"),
        ("cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl", '{"did": "9:1", "txt": "é"}\n', r"not M-BEIR JSON lines"),
        (
            "cand_pool/local/mbeir_cirr_task7_test_cand_pool.jsonl",
            '{"did": "9:1"}\n',
            r"cand_pool: task 'cirr_task7' has 2",
        ),
        ("cand_pool/local/pool.jsonl", "", r"pool.jsonl: pools are named mbeir_DATASET"),
        ("query/test/mbeir_cirr_task7_test.jsonl", '{"qid": "9:1", "query_txt": "é"}\n', r"not M-BEIR JSON lines"),
        ("qrels/test/mbeir_cirr_task7_test_qrels.txt", "é", r"qrels.txt: not UTF-8 text"),
        ("instructions/query_instructions.tsv", "h\né\n", r"instructions.tsv: not UTF-8 text"),
    ],
)
def test_errors_in_mbeir_name_the_file_and_line(mbeir, file, text, message):
    (mbeir / file).write_text(text, encoding="latin-1")
    for _ in range(2):
        with pytest.raises(UserError, match=message) as error:
            open_mbeir(mbeir).validate("test")
        assert "\n" not in str(error.value)


def test_mbeirs_prompts_are_needed(mbeir):
    (mbeir / "instructions/query_instructions.tsv").unlink()
    with pytest.raises(UserError, match=r"query_instructions.tsv: not found; copy M-BEIR's instruction table there"):
        open_mbeir(mbeir).validate("test")


def test_real_mbeir_queries_and_prompts_are_read(mbeir, shared_dir):
    """The published CIRR, MSCOCO and WebQA queries, with stand-ins for their documents, which are not available."""
    topics = shared_dir / "data" / "mbeir" / "topics"
    positives = set()
    for task in ("cirr_task7", "mscoco_task3", "webqa_task2"):
        text = (topics / f"topics.mbeir-{task}.test.jsonl").read_text()
        (mbeir / f"query/test/mbeir_{task}_test.jsonl").write_text(text)
        positives.update(did for line in text.splitlines() for did in json.loads(line)["pos_cand_list"])
    lines = (json.dumps(document(did, "A.", None, "text")) + "\n" for did in sorted(positives))
    (mbeir / "cand_pool/local/mbeir_mscoco_task3_test_cand_pool.jsonl").write_text("".join(lines))
    prompts = (shared_dir / "data" / "mbeir" / "query_instructions.tsv").read_text()
    (mbeir / "instructions/query_instructions.tsv").write_text(prompts)
    (mbeir / "qrels/test/mbeir_cirr_task7_test_qrels.txt").unlink()
    data = open_mbeir(mbeir)
    data.validate("test")
    rows = {(row["task"], row["id"]): row for row in query_rows(data, "test")}
    assert rows["cirr_task7", "8:1"]["text"] == "Show three bottles of soft drink."
    assert rows["mscoco_task3", "9:6"]["positive_ids"] == ["9:2", "9:3", "9:4", "9:5", "9:6"]
    assert rows["webqa_task2", "2:1"]["modality"] == "text"
