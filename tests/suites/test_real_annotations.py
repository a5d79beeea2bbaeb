"""Readers on the real annotation files at hand. No pictures of them are: some are generated, others lack."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.support.suite_folders import draw
from umarvel_ray.suites.registry import SUITES
from umarvel_ray.suites.suite import SPLIT, open_suite


@pytest.fixture
def annotations(shared_dir):
    return shared_dir / "data/annotations"


def test_circo(annotations, tmp_path):
    root, rows = tmp_path / "circo", json.loads((annotations / "circo/val.json").read_text())
    (root / "annotations").mkdir(parents=True)
    shutil.copy(annotations / "circo/val.json", root / "annotations")
    ids = sorted({number for row in rows for number in (row["reference_img_id"], *row["gt_img_ids"])})
    unlabeled = root / "COCO2017_unlabeled"
    (unlabeled / "annotations").mkdir(parents=True)
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in ids]
    (unlabeled / "annotations/image_info_unlabeled2017.json").write_text(json.dumps({"images": images}))
    draw(root, (f"COCO2017_unlabeled/unlabeled2017/{row['file_name']}" for row in images[:20]))
    data = open_suite(SUITES["circo"], root, tmp_path / "tables")
    queries = data.queries(SPLIT)
    assert (queries.n, len(rows)) == (220, 220)
    found = [[data.document_ids[row].as_py() for row in own] for own in queries.positives.lists()]
    assert found == [list(map(str, row["gt_img_ids"])) for row in rows]
    stored = queries.table.rows(queries.rows, ("text", "image"))
    assert [row["text"] for row in stored] == [row["relative_caption"] for row in rows]
    assert [row["image"][-16:-4] for row in stored] == [f"{row['reference_img_id']:012d}" for row in rows]
    assert max(queries.positives.counts) > 10


def test_genecis_objects(annotations, tmp_path):
    """The galleries of all queries; every one holds its target, and all are of one length, as published."""
    root = tmp_path / "genecis"
    (root / "VG_100K_all").mkdir(parents=True)
    rows = {}
    for task in ("change_object", "focus_object"):
        shutil.copy(annotations / f"genecis/{task}.json", root)
        rows[task] = json.loads((root / f"{task}.json").read_text())
    for task in ("change_attribute", "focus_attribute"):
        (root / f"{task}.json").write_text("[]")
    shown = rows["change_object"][0]
    draw(root, (f"val2017/{part['val_image_id']:012d}.jpg" for part in (shown["reference"], shown["target"])))
    data = open_suite(SUITES["genecis"], root, tmp_path / "tables")
    queries = data.queries(SPLIT)
    assert queries.tasks == tuple(rows)
    assert queries.n == sum(map(len, rows.values()))
    assert set(queries.galleries.counts) <= {14, 15}
    assert queries.galleries.contains_pairs(queries.positives.owners, queries.positives.values).all()
    first = [data.document_ids[row].as_py() for row in queries.galleries.at(0)]
    assert first == [f"coco {part['val_image_id']}" for part in (shown["target"], *shown["gallery"])]


def test_sugarcrepe(annotations, tmp_path):
    root = tmp_path / "sugarcrepe"
    (root / "val2017").mkdir(parents=True)
    shutil.copytree(annotations / "sugarcrepe/data", root / "data")
    data = open_suite(SUITES["sugarcrepe"], root, tmp_path / "tables")
    queries = data.queries(SPLIT)
    counts = {task: len(queries.of_task(task)) for task in queries.tasks}
    assert counts == {
        "add_att": 692, "add_obj": 2062, "replace_att": 788, "replace_obj": 1652, "replace_rel": 1406, "swap_att": 666,
        "swap_obj": 245,
    }  # fmt: skip
    assert set(queries.galleries.counts) == {2}
    right = data.documents.rows(queries.positives.values[:1])[0]["text"]
    assert right == json.loads((root / "data/add_att.json").read_text())["0"]["caption"]
