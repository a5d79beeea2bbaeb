"""Every benchmark's reader on a tiny folder in its exact published layout."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.support.suite_folders import FOLDERS
from umarvel_ray.data.dataset import Dataset
from umarvel_ray.errors import UserError
from umarvel_ray.suites.registry import HELD_OUT, MBEIR, NAMES, SUITES, check_name
from umarvel_ray.suites.suite import SPLIT, open_suite

CHANGES = "I'm looking for a similar everyday image with the described changes."
CAPTION, DESCRIBE = (
    "Find me an everyday image that matches the given caption.",
    "Find an image caption describing the following everyday image.",
)


@pytest.fixture
def opened(tmp_path):
    """Opens a benchmark's tiny folder."""

    def opens(name: str, reference: bool = False) -> Dataset:
        FOLDERS[name](tmp_path / name)
        return open_suite(SUITES[name], tmp_path / name, tmp_path / "tables", reference)

    return opens


def shown(data: Dataset, root: str = "") -> list[dict]:
    """The queries with ids of positives and galleries, and paths relative to the folder."""
    queries, ids = data.queries(SPLIT), data.document_ids.to_pylist()
    rows = queries.table.rows(queries.rows)
    for number, row in enumerate(rows):
        row["positives"] = [ids[at] for at in queries.positives.at(number)]
        row["gallery"] = [ids[at] for at in queries.galleries.at(number)] if queries.galleries else None
    return rows


def pool(data: Dataset, task: str) -> list[str]:
    return [data.document_ids[row].as_py() for row in data.pool(task, SPLIT).tolist()]


def documents(data: Dataset) -> dict[str, dict]:
    return {row["id"]: row for row in data.documents.rows(range(data.documents.num_rows))}


def relative(path: str, data: Dataset) -> str:
    return path.removeprefix(f"{data.root.absolute()}/")


def test_every_benchmark_has_a_folder_here():
    assert set(FOLDERS) == set(SUITES)
    assert set(NAMES) == {*SUITES, MBEIR, HELD_OUT}
    with pytest.raises(UserError, match="no benchmark 'imagenet'; choose one of: mbeir, "):
        check_name("imagenet")


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_query_refers_to_is_there(opened, name):
    """Every picture and video exists, positives are in the pool or gallery, and each query has an instruction."""
    data = opened(name)
    for row in [*shown(data), *documents(data).values()]:
        for path in [row[kind] for kind in ("image", "video") if isinstance(row.get(kind), str)]:
            assert (data.root / path).is_file()
        assert row.get("text") or row.get("image") or row.get("video")
    for row in shown(data):
        assert set(row["positives"]) <= set(row["gallery"] or pool(data, row["task"]))
        assert row["instruction"] or name == "mmeb"
    data.validate(SPLIT)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_file_is_named_with_the_layout_and_the_source(opened, tmp_path, name):
    opened(name)
    suite = SUITES[name]
    for file in suite.files:
        (tmp_path / name / file).rename(tmp_path / "elsewhere")
        with pytest.raises(UserError) as raised:
            open_suite(suite, tmp_path / name, tmp_path / "tables")
        message = str(raised.value)
        assert str(tmp_path / name / file) in message
        assert all(other in message for other in suite.files)
        assert suite.source in message
        (tmp_path / "elsewhere").rename(tmp_path / name / file)


@pytest.mark.parametrize("name", [name for name in FOLDERS if SUITES[name].files[0].endswith(".json")])
def test_a_damaged_file_is_one_line(opened, tmp_path, name):
    opened(name)
    file = tmp_path / name / SUITES[name].files[0]
    file.write_text("[{")
    with pytest.raises(UserError, match="not JSON"):
        open_suite(SUITES[name], tmp_path / name, tmp_path / "tables")


def test_captions_go_both_ways(opened):
    for name, captions in (("sharegpt4v", 1), ("urban1k", 1), ("flickr30k", 5), ("coco", 5)):
        data = opened(name)
        rows = {task: [row for row in shown(data) if row["task"] == task] for task in ("t→i", "i→t")}
        assert len(rows["t→i"]) == captions * len(rows["i→t"])
        assert {row["instruction"] for row in rows["t→i"]} == {CAPTION}
        assert {row["instruction"] for row in rows["i→t"]} == {DESCRIBE}
        assert all(len(row["positives"]) == captions and row["image"] for row in rows["i→t"])
        assert all(len(row["positives"]) == 1 and row["text"] for row in rows["t→i"])
        assert len(pool(data, "t→i")) == len(rows["i→t"])
        assert len(pool(data, "i→t")) == len(rows["t→i"])


def test_urban1k_reads_the_first_line_and_pairs_by_name(opened):
    data = opened("urban1k")
    found = {row["text"]: row["positives"] for row in shown(data) if row["task"] == "t→i"}
    texts = {text: relative(documents(data)[ids[0]]["image"], data) for text, ids in found.items()}
    assert texts == {f"A street with {n} cars.": f"image/{n}.jpg" for n in (1, 2, 10)}


def test_karpathys_test_split_only(opened):
    data = opened("coco")
    assert [relative(row["image"], data) for row in documents(data).values() if row["image"]] == [
        "val2014/1.jpg",
        "val2014/3.jpg",
    ]


def test_visdial_joins_the_turns_without_the_caption(opened):
    first, _ = shown(opened("visdial"))
    assert first["text"] == "Q: is it sunny? A: yes. Q: any people? A: 2 people."
    assert first["positives"] == ["185565"]


def test_circo_has_several_truths_and_all_unlabeled_pictures(opened):
    data = opened("circo")
    first, second = shown(data)
    assert first["positives"] == ["11", "12"]
    assert second["positives"] == ["10"]
    assert pool(data, "circo") == [str(n) for n in range(10, 16)]
    assert (first["text"], first["instruction"]) == ("has two dogs", CHANGES)
    assert relative(first["image"], data) == "COCO2017_unlabeled/unlabeled2017/000000000010.jpg"


def test_multiturn_fashioniq_shows_all_turns(opened):
    data = opened("multiturn-fashioniq")
    first, second = shown(data)
    assert [relative(path, data) for path in first["image"]] == ["images/B001.jpg", "images/B002.jpg"]
    assert first["text"] == "is longer\nis red and has no sleeves"
    assert (first["positives"], second["positives"]) == (["B000"], ["B003"])


def test_vist_shows_all_but_the_last_picture(opened):
    data = opened("vist")
    first, _ = shown(data)
    assert [relative(path, data) for path in first["image"]] == [
        "images/val/a.jpg", "images/val/b.jpg", "images/val/c.png", "images/val/d.jpg"
    ]  # fmt: skip
    assert first["text"].splitlines()[-1] == "sentence 4 ."
    assert first["positives"] == ["e"]
    assert SUITES["vist"].hide_seen


def test_genecis_has_a_gallery_per_query(opened):
    data = opened("genecis")
    rows = shown(data)
    assert [row["task"] for row in rows] == [
        "change_object", "change_object", "focus_object", "focus_object", "change_attribute", "focus_attribute"
    ]  # fmt: skip
    assert rows[0]["gallery"] == ["coco 2", "coco 3", "coco 4"]
    assert rows[1]["positives"] == ["coco 5"]
    assert [row["text"] for row in rows[::4]] == ["wall", "red"]
    assert rows[0]["image"] == (data.root / "val2017/000000000001.jpg").read_bytes()


def test_genecis_cuts_objects_out_with_their_surroundings(opened):
    """0.7 of the box's width to the left and of its height above, 1.7 of each in all, padded to a square in black."""
    data = opened("genecis")
    cut = Image.open(io.BytesIO(documents(data)["vg 2 12 20 30 20"]["image"]))
    whole = Image.open(data.root / "VG_100K_all/2.jpg").convert("RGB")
    left, top = 0, 20 - 0.7 * 20
    expected = whole.crop((left, round(top), round(left + 1.7 * 30), round(top + 1.7 * 20)))
    assert cut.size == (51, 51)
    pixels = np.asarray(cut)
    assert not pixels[:8].any()
    assert (pixels[8 : 8 + expected.height] == np.asarray(expected)).all()


def test_a_missing_picture_of_genecis_is_set_aside_later(opened, tmp_path):
    FOLDERS["genecis"](tmp_path / "genecis")
    (tmp_path / "genecis/VG_100K_all/2.jpg").unlink()
    data = open_suite(SUITES["genecis"], tmp_path / "genecis", tmp_path / "tables")
    stored = documents(data)["vg 2 12 20 30 20"]["image"]
    assert b"No such file" in stored


def test_sugarcrepe_and_cc_neg_offer_two_texts(opened):
    data = opened("sugarcrepe")
    rows = shown(data)
    assert len(rows) == 14
    assert all(row["gallery"][:1] == row["positives"] and len(row["gallery"]) == 2 for row in rows)
    texts = documents(data)
    assert [texts[id_]["text"] for id_ in rows[1]["gallery"]] == ["A add_att.", "Not add_att 1."]
    data = opened("cc-neg")
    last = shown(data)[-1]
    assert [documents(data)[id_]["text"] for id_ in last["gallery"]] == ["a dog 2", "a dog that is not 2"]
    assert relative(last["image"], data) == "cc3m/cc3m_images/2.jpg"


def test_the_reference_tells_fewer_queries_of_sugarcrepe(opened):
    told = {row["task"]: row["instruction"] for row in shown(opened("sugarcrepe", reference=True))}
    assert [task for task, text in told.items() if text is None] == ["replace_rel", "swap_att", "swap_obj"]
    assert {row["instruction"] for row in shown(opened("sugarcrepe"))} == {DESCRIBE}


def test_videos(opened):
    data = opened("msr-vtt")
    assert [(row["text"], row["positives"]) for row in shown(data)] == [
        ("a man, singing", ["video9770"]),
        ("a woman cooks", ["video9771"]),
    ]
    data = opened("msvd")
    rows = shown(data)
    assert len(rows) == 6  # every caption is a query
    assert rows[4]["text"] == "a squirrel eats 1"
    assert relative(documents(data)["video_1_2"]["video"], data) == "YouTubeClips/video_1_2.avi"


def test_a_pickle_that_could_run_code_is_refused(opened, tmp_path):
    opened("msvd")
    (tmp_path / "msvd/raw-captions.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"not a pickle of plain values \(it refers to .*system\)"):
        open_suite(SUITES["msvd"], tmp_path / "msvd", tmp_path / "tables")


def test_mmeb_has_candidates_of_its_own_the_first_of_which_is_right(opened):
    data = opened("mmeb")
    rows = {row["id"]: row for row in shown(data)}
    assert len(rows) == 72
    first = rows["VOC2007 query 0"]
    assert (first["text"], first["instruction"]) == (None, "Represent the given image for classification")
    assert [documents(data)[id_]["text"] for id_ in first["gallery"]] == ["right", "wrong"]
    assert first["gallery"] == rows["VOC2007 query 1"]["gallery"]  # documents occur once
    other = rows["N24News query 0"]  # without an entry in data_instruction.json, the text says it
    assert (other["text"], other["instruction"]) == ("Represent the given image for classification", None)
    pictures = rows["MSCOCO_t2i query 0"]
    assert [relative(documents(data)[id_]["image"], data) for id_ in pictures["gallery"]] == [
        "images/MSCOCO_t2i/1.jpg", "images/MSCOCO_t2i/2.jpg"
    ]  # fmt: skip
    assert documents(data)[pictures["gallery"][0]]["text"] is None


def test_mmeb_reads_the_hubs_tables_too(opened, tmp_path):
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    before = shown(opened("mmeb"))
    for file in list((tmp_path / "mmeb").glob("*/*_test.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        pq.write_table(pa.Table.from_pylist(rows), file.with_name("test-00000-of-00001.parquet"))
        file.unlink()
    assert shown(open_suite(SUITES["mmeb"], tmp_path / "mmeb", tmp_path / "tables")) == before
    next((tmp_path / "mmeb").glob("GQA/*.parquet")).unlink()
    with pytest.raises(UserError, match=r"GQA_test\.jsonl: not found, nor .*test-\*\.parquet"):
        open_suite(SUITES["mmeb"], tmp_path / "mmeb", tmp_path / "tables")


def test_mmebs_sets_are_36():
    groups = SUITES["mmeb"].groups
    sizes = {name: len(members) for name, members in groups.items()}
    assert sizes == {
        "Classification": 10, "VQA": 10, "Retrieval": 12, "Grounding": 4, "in-domain": 20, "out-of-domain": 16
    }  # fmt: skip
