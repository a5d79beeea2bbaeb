"""Reading Parquet and M-BEIR folders, and one line for each error in them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from umarvel_ray.data.tables import Dataset, item_of, open_dataset
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


@pytest.fixture
def write(tmp_path):
    """Write a folder, with some tables changed, and open it."""

    def _write(documents=DOCUMENTS, test=QUERIES, pools=POOLS) -> Dataset:
        for name, rows in (("documents", documents), ("test", test), ("pools", pools)):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        return open_dataset(Data(root=str(tmp_path)))

    return _write


def test_a_valid_folder_reads_as_written(write):
    data = write()
    data.validate("test")
    assert data.documents.to_pylist() == DOCUMENTS
    assert data.queries("test").to_pylist() == QUERIES
    assert data.row_of == {"d1": 0, "d2": 1, "d3": 2}
    assert data.tasks("test") == ["s_task0", "s_task1"]
    assert data.pool("s_task0", "test") == ["d2", "d1"]
    assert data.global_pool("test") == ["d2", "d1", "d3"]
    assert data.global_pool("train") == ["d1"]


def test_an_item_is_the_row_without_nulls_and_other_columns():
    assert item_of(DOCUMENTS[0]) == {"text": "a fox"}
    assert item_of(DOCUMENTS[2]) == {"text": "boats", "image": b"png"}
    assert item_of(QUERIES[0]) == {"text": "what?", "instruction": "Find it."}


def test_image_paths_are_relative_to_the_folder(write, tmp_path):
    paths = ["img/a.png", "/else/b.png", "data:image/png;base64,AA", None]
    rows = [{**DOCUMENTS[0], "id": str(i), "image": path} for i, path in enumerate(paths)]
    assert write(documents=rows).documents["image"].to_pylist() == [str(tmp_path / "img/a.png"), *paths[1:]]


def without(rows: list[dict], column: str) -> list[dict]:
    return [{key: value for key, value in row.items() if key != column} for row in rows]


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
        (
            {"pools": [POOLS[0], {**POOLS[1], "document_ids": []}]},
            r"the pool of task 's_task1', split 'test', is empty",
        ),
    ],
)
def test_errors_name_the_table_and_row(write, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        write(**change).validate("test")
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


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
    return open_dataset(Data(root=str(root), format="mbeir"))


def test_mbeir_reads_as_published(mbeir):
    data = open_mbeir(mbeir)
    assert sorted(data.row_of) == ["8:1", "8:2", "9:1", "9:5"]
    assert data.documents.slice(data.row_of["8:2"], 1).to_pylist() == [
        {
            "id": "8:2",
            "text": None,
            "image": str(mbeir / "mbeir_images/b.jpg"),
            "modality": "image",
            "source": "cirr",
        }
    ]
    assert data.tasks("test") == ["cirr_task7", "mscoco_task0"]
    assert data.pool("cirr_task7", "test") == ["8:1", "8:2"]
    assert data.tasks("validation") == ["cirr_task7"]
    assert data.global_pool("train") == ["9:5", "9:1"]
    data.validate("test")
    data.validate("train")
    cirr, coco = data.queries("test").to_pylist()
    assert cirr == {
        "id": "8:1",
        "text": "Show three.",
        "image": str(mbeir / "mbeir_images/q.jpg"),
        "modality": "image,text",
        "source": "cirr",
        "instruction": "Change it.",
        "positive_ids": ["8:2"],  # the qrels', relevance above 0
        "task": "cirr_task7",
    }
    assert coco["positive_ids"] == ["9:1"]
    assert coco["instruction"] in ("Find me.", "Show me.")
    assert data.queries("test").equals(open_mbeir(mbeir).queries("test"))
    assert data.queries("train")["task"].to_pylist() == ["mscoco_task0"]


def test_mbeirs_training_union_is_split_into_tasks(mbeir):
    kinds = [("5:1", "text"), ("5:2", "image,text"), ("6:1", "text"), ("9:5", "image"), ("9:6", "text")]
    union = mbeir / "cand_pool/global/mbeir_union_train_cand_pool.jsonl"
    union.write_text("".join(json.dumps(document(did, "A.", None, kind)) + "\n" for did, kind in kinds))
    train = mbeir / "query/union_train/mbeir_union_up_train.jsonl"
    train.write_text(train.read_text() * 2)
    data = open_mbeir(mbeir)
    assert {task: data.pool(task, "train") for task in data.tasks("train")} == {
        "mscoco_task0": ["9:5"],
        "mscoco_task3": ["9:6"],
        "oven_task6": ["5:1", "6:1"],
        "oven_task8": ["5:2"],
        "infoseek_task6": ["5:1", "6:1"],
        "infoseek_task8": ["5:2"],
    }
    assert data.queries("train")["id"].to_pylist() == ["9:3", "9:3#2"]
    data.validate("train")


def test_other_pairs_use_mbeirs_layout(mbeir):
    (mbeir / "query/nli").mkdir()
    (mbeir / "query/nli/pairs.jsonl").write_text(json.dumps(query("10:1", "A cat.", None, "text", ["10:1"], 1)) + "\n")
    pool = mbeir / "cand_pool/global/mbeir_nli_cand_pool.jsonl"
    pool.write_text(json.dumps(document("10:1", "An animal.", None, "text")) + "\n")
    data = open_mbeir(mbeir)
    data.validate("nli")
    [row] = data.queries("nli").to_pylist()
    assert (row["task"], row["source"], row["instruction"]) == ("nli_task1", "nli", None)
    assert "10:1" not in data.global_pool("train") + data.global_pool("test")
    with pytest.raises(UserError, match=r"query/cc3m: no \*.jsonl for the query table 'cc3m'"):
        data.queries("cc3m")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("qrels/test/mbeir_cirr_task7_test_qrels.txt", "8:1 0\n", r"qrels.txt: line 1: expected 'qid 0 did"),
        ("qrels/test/mbeir_cirr_task7_test_qrels.txt", "8:1 0 8:77 1 7\n", r"names the unknown document '8:77'"),
        ("query/test/mbeir_cirr_task7_test.jsonl", "{not json\n", r"task7_test.jsonl: not M-BEIR JSON lines"),
        ("query/test/mbeir_cirr_task7_test.jsonl", '{"query_txt": "a"}\n', r"a line has no 'qid'"),
        ("query/test/mbeir_cirr_task7_test.jsonl", '{"qid": "77:1"}\n', r"line 1: id '77:1' is not DATASET:NUMBER"),
        ("instructions/query_instructions.tsv", "h\ntext\timage\n", r"instructions.tsv: line 2: expected"),
        ("cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl", "", r"cand_pool.jsonl"),
    ],
)
def test_errors_in_mbeir_name_the_file_and_line(mbeir, file, text, message):
    (mbeir / file).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        open_mbeir(mbeir).validate("test")
    assert "\n" not in str(error.value)


def test_real_mbeir_queries_and_prompts_are_read(mbeir, shared_dir):
    """The published CIRR, MSCOCO and WebQA queries; their pools are not available, so the positives stay unknown."""
    topics = shared_dir / "data" / "mbeir" / "topics"
    for task in ("cirr_task7", "mscoco_task3", "webqa_task2"):
        text = (topics / f"topics.mbeir-{task}.test.jsonl").read_text()
        (mbeir / f"query/test/mbeir_{task}_test.jsonl").write_text(text)
    prompts = (shared_dir / "data" / "mbeir" / "query_instructions.tsv").read_text()
    (mbeir / "instructions/query_instructions.tsv").write_text(prompts)
    (mbeir / "qrels/test/mbeir_cirr_task7_test_qrels.txt").unlink()
    data = open_mbeir(mbeir)
    rows = {row["id"]: row for row in data.queries("test").to_pylist()}
    assert rows["8:1"]["text"] == "Show three bottles of soft drink."
    assert rows["9:6"]["task"] == "mscoco_task3"
    assert rows["9:6"]["positive_ids"] == ["9:2", "9:3", "9:4", "9:5", "9:6"]
    assert rows["2:1"]["modality"] == "text"
    with pytest.raises(UserError, match="unknown document"):
        data.validate("test")
