"""The made-up M-BEIR folder: counts, layout, and what its rows refer to."""

from __future__ import annotations

import csv
import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.common.mbeir_folder import MARKER, MSCOCO, TASKS, Counts, write_mbeir_folder
from umarvel_ray.data.mbeir import DATASETS, TARGETS
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.recipe import Data

SCALE = 0.0005
UNION_TRAIN = "query/union_train/mbeir_union_up_train.jsonl"


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Path, Counts]:
    root = tmp_path_factory.mktemp("mbeir") / "M-BEIR"
    return root, write_mbeir_folder(root, SCALE)


@pytest.fixture(scope="module")
def pools(folder) -> dict[str, list[dict]]:
    return {file.stem: read(file) for file in sorted(folder[0].glob("cand_pool/*/*.jsonl"))}


def test_published_totals():
    assert sum(task.pool for task in TASKS) == 5_609_079
    assert sum(task.rows for task in TASKS) == 1_332_790
    assert sum(part["train"] for part in MSCOCO.values()) == 614_353
    assert sum(task.training for task in TASKS) + 614_353 == 1_930_000
    assert 1.1e6 < sum(task.distinct for task in TASKS) < 1.2e6
    assert sum(task.test for task in TASKS) == pytest.approx(190_000, rel=0.005)
    assert sum(task.pool * task.text_bytes for task in TASKS) == pytest.approx(2.4e9, rel=0.02)


def test_counts_are_the_published_ones_scaled(folder, pools):
    root, counts = folder
    assert counts == pytest.approx(
        (1_332_790 * SCALE, 190_528 * SCALE, 5_609_079 * SCALE, 1_930_000 * SCALE, 1.2e6), 0.1
    )
    union = pools["mbeir_union_test_cand_pool"]
    assert counts.documents == len(union)
    assert counts.training_documents == len(pools["mbeir_union_train_cand_pool"])
    assert counts.text_bytes == sum(len((row["txt"] or "").encode()) for row in union)
    assert counts.train_queries == len(read(root / UNION_TRAIN))
    assert counts.test_queries == sum(len(read(file)) for file in root.glob("query/test/*"))
    assert write_mbeir_folder(root, SCALE) == counts


def test_layout_is_the_published_one(folder, pools):
    root, _ = folder
    names = [f"{task.dataset}_task{task.number}" for task in TASKS]
    for split in ("val", "test"):
        assert {path.stem for path in root.glob(f"query/{split}/*.jsonl")} == {f"mbeir_{n}_{split}" for n in names}
        assert {p.name for p in root.glob(f"qrels/{split}/*")} == {f"mbeir_{n}_{split}_qrels.txt" for n in names}
        local = [f"{n}_{split}" if n.startswith("mscoco") else n for n in names]
        rows = Counter(row["did"] for n in local for row in pools[f"mbeir_{n}_cand_pool"])
        assert rows == Counter(row["did"] for row in pools[f"mbeir_union_{split}_cand_pool"])
    assert len(pools) == 14 + 4 + 3
    document, query = pools["mbeir_edis_task2_cand_pool"][0], read(root / "query/test/mbeir_cirr_task7_test.jsonl")[0]
    assert list(document) == ["did", "txt", "img_path", "modality", "src_content"]
    assert list(query) == [
        *("qid", "query_txt", "query_img_path", "query_modality"),
        *("query_src_content", "pos_cand_list", "neg_cand_list", "task_id"),
    ]
    table = csv.reader((root / "instructions/query_instructions.tsv").open(), delimiter="\t", quoting=csv.QUOTE_NONE)
    assert [len(row) for row in table] == [8] * 17


def test_queries_refer_to_their_tasks_pools(folder, pools):
    root, _ = folder
    for split in ("val", "test"):
        for file in root.glob(f"query/{split}/*.jsonl"):
            name = file.stem.removesuffix(f"_{split}")
            pool = pools.get(f"{name}_cand_pool") or pools[f"{name}_{split}_cand_pool"]
            qrels = [line.split() for line in (root / f"qrels/{split}/{file.stem}_qrels.txt").read_text().splitlines()]
            positives = [(row["qid"], did) for row in read(file) for did in row["pos_cand_list"]]
            assert [(qid, did) for qid, _, did, _, _ in qrels] == positives
            assert {did for _, did in positives} <= {row["did"] for row in pool}
            assert {(zero, relevance, f"task{task}") for _, zero, _, relevance, task in qrels} == {
                ("0", "1", name.rpartition("_")[2])
            }
    modality = {row["did"]: row["modality"] for row in pools["mbeir_union_train_cand_pool"]}
    for row in read(root / UNION_TRAIN):
        assert {modality[did] for did in row["pos_cand_list"]} == {TARGETS[row["task_id"]]}
        assert not set(row["pos_cand_list"]) & set(row["neg_cand_list"])


def test_training_repeats_the_queries_of_small_datasets(folder):
    times = Counter(row["qid"] for row in read(folder[0] / UNION_TRAIN))
    repeated = {DATASETS[int(qid.partition(":")[0])] for qid, count in times.items() if count > 1}
    assert repeated == {"fashion200k", "webqa", "edis", "nights", "fashioniq", "cirr"}


def test_ids_and_contents_repeat(folder, pools):
    root, _ = folder
    rows = {row["did"]: row for row in chain(*pools.values())}
    assert all(rows[row["did"]] == row for row in chain(*pools.values()))
    shared = [row["did"] for row in pools["mbeir_infoseek_task6_cand_pool"] if row["did"].startswith("5:")]
    assert 0 < len(shared) == len({*shared} & {row["did"] for row in pools["mbeir_oven_task6_cand_pool"]})
    contents = Counter((row["txt"], row["img_path"]) for row in rows.values())
    assert 1 - len(contents) / len(rows) == pytest.approx(0.05, abs=0.01)
    shown = {row["img_path"] for row in rows.values()}
    cirr = [row["query_img_path"] for row in read(root / "query/test/mbeir_cirr_task7_test.jsonl")]
    oven = [row["query_img_path"] for row in read(root / "query/test/mbeir_oven_task8_test.jsonl")]
    assert {*cirr} & shown
    assert not {*oven} & shown


def test_pictures_open(folder, pools):
    root, _ = folder
    queries = chain.from_iterable(read(file) for file in root.glob("query/*/*.jsonl"))
    paths = {row["img_path"] for row in chain(*pools.values())} | {row["query_img_path"] for row in queries}
    paths.remove(None)
    assert all((root / path).is_file() for path in paths)
    files = {(root / path).resolve() for path in paths}
    assert 100 < len(files) < 1000
    sizes = {Image.open(file).size for file in files}
    assert all(32 <= side <= 64 for size in sizes for side in size)


def test_a_seed_is_a_folder(folder, tmp_path):
    root, counts = folder
    assert write_mbeir_folder(tmp_path / "same", SCALE) == counts
    assert contents(tmp_path / "same") == contents(root)
    write_mbeir_folder(tmp_path / "same", SCALE, seed=1)
    assert contents(tmp_path / "same").keys() >= contents(root).keys()
    assert contents(tmp_path / "same")[UNION_TRAIN] != contents(root)[UNION_TRAIN]
    (tmp_path / "same" / MARKER).unlink()
    write_mbeir_folder(tmp_path / "same", SCALE)
    assert contents(tmp_path / "same") == contents(root)


def test_text_scales_the_texts(folder, tmp_path):
    short = write_mbeir_folder(tmp_path / "short", SCALE, text=0.25)
    assert short[:4] == folder[1][:4]
    assert short.text_bytes == pytest.approx(folder[1].text_bytes / 4, rel=0.15)


def test_the_reader_accepts_it(folder):
    root, counts = folder
    data = open_dataset(Data(root=str(root), format="mbeir"))
    for name in ("train", "validation", "test"):
        data.validate(name)
        assert len(data.tasks(name)) == 16
    assert sum(len(data.pool(task, "test")) for task in data.tasks("test")) == counts.documents
    trained = {task: len(data.pool(task, "train")) for task in data.tasks("train")}
    assert trained["oven_task6"] == trained["infoseek_task6"]  # they share their documents
