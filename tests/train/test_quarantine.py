"""A bad picture never stops a run, and is never dropped without a recorded reason."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.mini_data import make_mini_data
from tests.support.small_dataset import noise_picture, query_rows
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.recipe import Data
from umarvel_ray.train import quarantine
from umarvel_ray.train.quarantine import reason_against, without_unusable


def corrupt(folder, table, column, rows, value):
    """Set a column of some rows to `value`; returns their ids."""
    path = folder / f"{table}.parquet"
    whole = pq.read_table(path)
    values = whole[column].to_pylist()
    ids = [whole["id"][row].as_py() for row in rows]
    for row in rows:
        values[row] = value
    index = whole.column_names.index(column)
    pq.write_table(whole.set_column(index, column, pa.array(values, whole.schema.field(column).type)), path)
    return ids


def with_image(folder, table, count):
    """The first `count` rows that have an image."""
    return [row for row, image in enumerate(pq.read_table(folder / f"{table}.parquet")["image"].to_pylist()) if image][
        :count
    ]


def test_bad_rows_are_set_aside_with_their_reason(ray_cluster, tmp_path):
    folder = make_mini_data(tmp_path / "data")
    bad_queries = corrupt(folder, "train", "image", with_image(folder, "train", 2), b"not a picture")
    alone = next(row for row in pq.read_table(folder / "train.parquet").to_pylist() if row["task"] == "emoji_task3")
    documents = pq.read_table(folder / "documents.parquet")["id"].to_pylist()
    (bad_document,) = corrupt(folder, "documents", "text", [documents.index(alone["positive_ids"][0])], None)
    dataset = open_dataset(Data(root=str(folder)))
    before = dataset.queries("train")
    clean = without_unusable(dataset, "train", tmp_path / "quarantine")
    kept = clean.queries("train")

    file = pq.read_table(tmp_path / "quarantine" / "train.parquet").to_pylist()
    reasons = {(row["table"], row["id"]): row["reason"] for row in file}
    assert reasons["documents", bad_document].startswith(f"documents {bad_document}: nothing to embed")
    assert all(
        reasons["train", id_].startswith(f"train {id_}: not a picture in a known format (") for id_ in bad_queries
    )
    for row in file:
        table = dataset.documents if row["table"] == "documents" else before.table
        assert table.rows([row["row"]], ["id"]) == [{"id": row["id"]}]
    lost = {row["id"] for row in file if row["table"] == "train"}
    assert {*bad_queries, alone["id"]} <= lost
    assert reasons["train", alone["id"]] == "none of its positives can be used"
    assert {*kept.ids()} == {*before.ids()} - lost
    left = [[id_ for id_ in row["positive_ids"] if id_ != bad_document] for row in query_rows(dataset, "train")]
    expected = {id_: ids for id_, ids in zip(before.ids(), left, strict=True) if id_ not in lost}
    assert {row["id"]: row["positive_ids"] for row in query_rows(clean, "train")} == expected
    again = without_unusable(dataset, "train", tmp_path / "quarantine")
    assert again.queries("train").digest == kept.digest != before.digest


def test_the_check_is_done_once_for_the_same_tables(ray_cluster, tmp_path, capsys, monkeypatch):
    folder = make_mini_data(tmp_path / "data")
    corrupt(folder, "train", "text", [0], None)
    corrupt(folder, "train", "image", [0], b"not a picture")

    def check() -> str:
        without_unusable(open_dataset(Data(root=str(folder))), "train", tmp_path / "quarantine")
        return capsys.readouterr().out

    assert "train: 1 of " in check()
    with monkeypatch.context() as patch:
        patch.setattr(quarantine, "_write_unusable", None)
        assert "train: 1 of " in check()
    path = folder / "train.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(1), table.slice(0, 1)]), path)
    assert "train: 1 of " in check(), "row numbers of other tables say nothing"


def test_an_empty_picture_is_none():
    assert reason_against({"text": "a fox", "image": b""}, "documents d1") is None
    reason = reason_against({"text": None, "image": b""}, "documents d1")
    assert reason is not None
    assert reason.startswith("documents d1: nothing to embed")


def test_a_picture_that_was_repaired_is_used_again(ray_cluster, tmp_path, capsys):
    folder = make_mini_data(tmp_path / "data")
    picture = folder / "picture.png"
    picture.write_bytes(b"broken")
    [row] = with_image(folder, "train", 1)
    table = pq.read_table(folder / "train.parquet").to_pylist()
    images = [str(picture) if number == row else None for number in range(len(table))]
    texts = [entry["text"] or "a thing" for entry in table]
    whole = pq.read_table(folder / "train.parquet")
    for name, values in (("image", images), ("text", texts)):
        whole = whole.set_column(whole.column_names.index(name), name, pa.array(values, pa.string()))
    pq.write_table(whole, folder / "train.parquet")
    dataset = open_dataset(Data(root=str(folder)), tmp_path / "tables")
    for _ in range(2):
        assert without_unusable(dataset, "train", tmp_path / "quarantine").queries("train").n == len(table) - 1
        assert "1 of" in capsys.readouterr().out
    picture.write_bytes(noise_picture(0))
    assert without_unusable(dataset, "train", tmp_path / "quarantine").queries("train").n == len(table)


def test_nothing_left_is_an_error(ray_cluster, tmp_path):
    folder = make_mini_data(tmp_path / "data")
    count = pq.read_metadata(folder / "text_pairs.parquet").num_rows
    corrupt(folder, "text_pairs", "text", range(count), None)
    with pytest.raises(UserError, match="no usable query in 'text_pairs'"):
        without_unusable(open_dataset(Data(root=str(folder))), "text_pairs", tmp_path / "quarantine")
