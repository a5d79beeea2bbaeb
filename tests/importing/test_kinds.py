"""Every kind of source gives the queries and documents that it holds, and nothing else."""

from __future__ import annotations

import gzip
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.importing.sources import (
    CAPTIONS,
    SPLITS,
    N,
    Write,
    captioned_table,
    color,
    found,
    image_feature,
    key_of,
    picture,
    pooled,
    reasons,
    rows,
    said,
    shown,
    write_csv,
    write_jsonl,
    write_pictures,
    write_saved,
    write_tar,
)
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.importing.importer import import_dataset
from umarvel_ray.recipe import Data

CAPTIONED: dict[str, Write] = {}
TRUTH = {(0, said(text)): {shown(number)} for number, text in enumerate(CAPTIONS)} | {
    (3, shown(number)): {said(text)} for number, text in enumerate(CAPTIONS)
}


def captioned(kind: str):
    def add(write: Write) -> Write:
        CAPTIONED[f"{kind}: {write.__name__}"] = write
        return write

    return add


@captioned("captions")
def a_csv_beside_the_pictures(folder: Path) -> Path:
    names = write_pictures(folder)
    write_csv(folder / "captions.csv", [("file", "caption"), *zip(names, CAPTIONS, strict=True)])
    return folder


@captioned("captions")
def a_csv_with_semicolons_and_other_columns(folder: Path) -> Path:
    names = write_pictures(folder / "images")
    lines = [(number, text, f"images/{name}") for number, (name, text) in enumerate(zip(names, CAPTIONS, strict=True))]
    write_csv(folder / "list.csv", [("nr", "Title", "Image Path"), *lines], ";")
    return folder


@captioned("captions")
def a_tsv_given_as_the_source(folder: Path) -> Path:
    names = write_pictures(folder)
    write_csv(folder / "a.tsv", [("filename", "text"), *zip(names, CAPTIONS, strict=True)], "\t")
    return folder / "a.tsv"


@captioned("captions")
def names_of_pictures_that_lie_deeper(folder: Path) -> Path:
    names = write_pictures(folder / "some" / "where")
    write_csv(folder / "a.csv", [("image", "caption"), *zip(names, CAPTIONS, strict=True)])
    return folder


@captioned("captions")
def an_imagefolder_with_metadata_csv(folder: Path) -> Path:
    names = write_pictures(folder / "train")
    write_csv(folder / "train" / "metadata.csv", [("file_name", "text"), *zip(names, CAPTIONS, strict=True)])
    return folder


@captioned("captions")
def an_imagefolder_with_metadata_jsonl(folder: Path) -> Path:
    lines = [{"file_name": name, "text": text} for name, text in zip(write_pictures(folder), CAPTIONS, strict=True)]
    write_jsonl(folder / "metadata.jsonl", lines)
    return folder


@captioned("captions")
def a_json_list(folder: Path) -> Path:
    lines = [{"image": name, "caption": text} for name, text in zip(write_pictures(folder), CAPTIONS, strict=True)]
    (folder / "all.json").write_text(json.dumps(lines))
    return folder / "all.json"


@captioned("captions")
def a_saved_dataset(folder: Path) -> Path:
    write_saved(folder / "saved", captioned_table())
    return folder / "saved"


@captioned("captions")
def a_saved_dataset_of_two_splits(folder: Path) -> Path:
    write_saved(folder / "all" / "train", captioned_table().slice(0, 8))
    write_saved(folder / "all" / "test", captioned_table().slice(8), shards=1)
    (folder / "all" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    return folder / "all"


@captioned("captions")
def a_folder_of_parquet(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for number in range(3):
        pq.write_table(captioned_table().slice(number * 4, 4), folder / "data" / f"train-{number}.parquet")
    return folder


@captioned("captions")
def a_zipped_csv(folder: Path) -> Path:
    names = write_pictures(folder)
    write_csv(folder / "a.csv", [("file", "caption"), *zip(names, CAPTIONS, strict=True)])
    (folder / "a.csv.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    (folder / "a.csv").unlink()
    return folder


@captioned("captions")
def zipped_json_lines(folder: Path) -> Path:
    lines = [{"file_name": name, "text": text} for name, text in zip(write_pictures(folder), CAPTIONS, strict=True)]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    return folder


def named(folder: Path, on_disk: Callable[[int], str], written: Callable[[int], str]) -> Path:
    """Pictures whose names are written in another way than they have on disk."""
    (folder / "a b").mkdir(parents=True)
    for n in range(N):
        (folder / "a b" / on_disk(n)).write_bytes(picture(n))
    write_csv(folder / "a.csv", [("file", "caption"), *((written(n), text) for n, text in enumerate(CAPTIONS))])
    return folder


@captioned("captions")
def names_as_macos_stores_them(folder: Path) -> Path:
    return named(folder, lambda n: unicodedata.normalize("NFD", f"é{n}.png"), lambda n: f"a b/é{n}.png")


@captioned("captions")
def names_in_another_case(folder: Path) -> Path:
    return named(folder, lambda n: f"IMG {n}.PNG", lambda n: f"img {n}.png")


@captioned("captions")
def urls_of_files(folder: Path) -> Path:
    return named(folder, lambda n: f"x {n}.png", lambda n: f"file://{folder}/a%20b/x%20{n}.png")


@captioned("captions")
def a_linked_folder_with_a_loop(folder: Path) -> Path:
    names = write_pictures(folder.parent / "elsewhere")
    write_csv(folder.parent / "elsewhere" / "a.csv", [("file", "caption"), *zip(names, CAPTIONS, strict=True)])
    folder.mkdir()
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere" / "loop").symlink_to(folder)
    return folder


@captioned("sidecars")
def text_files_named_otherwise(folder: Path) -> Path:
    for n, (name, text) in enumerate(zip(write_pictures(folder), CAPTIONS, strict=True)):
        file = (folder / name).with_suffix(".TXT") if n % 2 else folder / f"{name}.txt"
        file.write_text(text, encoding="utf-8")
    return folder


@captioned("webdataset")
def members_with_dots_in_their_names(folder: Path) -> Path:
    members = [(f"photo.{n}.{part}", content) for n in range(N)
               for part, content in (("png", picture(n)), ("txt", CAPTIONS[n].encode()))]  # fmt: skip
    write_tar(folder / "a.tar", members)
    return folder


@captioned("sidecars")
def text_files_beside_the_pictures(folder: Path) -> Path:
    for name, text in zip(write_pictures(folder / "a"), CAPTIONS, strict=True):
        (folder / "a" / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return folder


@captioned("sidecars")
def json_files_beside_the_pictures(folder: Path) -> Path:
    """As many exporters write them: more keys, a title that repeats the file's name, several captions."""
    for n, (name, text) in enumerate(zip(write_pictures(folder), CAPTIONS, strict=True)):
        key, value = ("Description", text) if n % 2 else ("text", [text, ""])
        file = (folder / name).with_suffix(".json") if n % 3 else folder / f"{name}.json"
        file.write_text(json.dumps({key: value, "title": name, "width": 9, "exif": None}), encoding="utf-8")
    return folder


@captioned("webdataset")
def a_tar_file_that_is_not_sorted(folder: Path) -> Path:
    """Pictures and other files first, texts last, in another order."""
    pictures = [(f"a/{n}.png", picture(n)) for n in range(N)]
    others = [(f"a/{n}.cls", b"7") for n in range(0, N, 2)]
    texts = [(f"a/{n}.json", json.dumps({"caption": CAPTIONS[n]}).encode()) for n in reversed(range(N))]
    write_tar(folder / "a.tar", [*pictures, *others, *texts])
    return folder


@captioned("webdataset")
def tar_files_with_texts(folder: Path) -> Path:
    for shard, numbers in enumerate((range(5), range(5, N))):
        members = [(f"{n:04}.{part}", content) for n in numbers
                   for part, content in (("png", picture(n)), ("txt", CAPTIONS[n].encode()))]  # fmt: skip
        write_tar(folder / f"shard-{shard}.tar", members)
    return folder


@captioned("webdataset")
def one_compressed_tar_file_with_json(folder: Path) -> Path:
    members = []
    for n, text in enumerate(CAPTIONS):
        members += [(f"a/{n}.json", json.dumps({"caption": text}).encode()), (f"a/{n}.webp", picture(n, "WEBP"))]
    write_tar(folder / "all.tar.gz", members)
    return folder / "all.tar.gz"


@pytest.mark.parametrize("name", CAPTIONED)
def test_captions_are_found_both_ways(name, tmp_path, capsys):
    source = CAPTIONED[name](tmp_path / "source")
    import_dataset(source, tmp_path / "out")
    assert found(tmp_path / "out") == TRUTH
    assert capsys.readouterr().out.startswith(f"kind: {name.split(':')[0]}")
    pools = pooled(tmp_path / "out")
    assert set.union(*(pools[0, split] for split in SPLITS)) == {shown(number) for number in range(N)}
    assert set.union(*(pools[3, split] for split in SPLITS)) == set(map(said, CAPTIONS))
    assert not (tmp_path / "out" / "quarantine").exists()


def queries(number: int) -> str:
    return f"question {number}?"


def answers(number: int) -> str:
    return f"answer {number}."


def wrongs(number: int) -> str:
    return f"wrong {number}."


def flagembedding(n: int) -> dict[str, Any]:
    return {"query": queries(n), "pos": [answers(n)], "neg": [wrongs(n)], "pos_scores": [0.9], "prompt": "Answer it."}


def tevatron(n: int) -> dict[str, Any]:
    return {
        "query_id": str(n),
        "query": queries(n),
        "positive_passages": [{"docid": f"p{n}", "title": "answer", "text": f"{n}."}],
        "negative_passages": [{"docid": f"n{n}", "title": "", "text": wrongs(n)}],
    }


def swift_messages(n: int) -> dict[str, Any]:
    return {
        "messages": [{"role": "system", "content": "Answer it."}, {"role": "user", "content": queries(n)}],
        "positive_messages": [[{"role": "assistant", "content": answers(n)}]],
        "negative_messages": [[{"role": "assistant", "content": wrongs(n)}]],
    }


def swift_responses(n: int) -> dict[str, Any]:
    return {"query": queries(n), "response": answers(n), "rejected_response": [wrongs(n)]}


def triplets(n: int) -> dict[str, Any]:
    return {"anchor": queries(n), "positive": answers(n), "negative": wrongs(n)}


def numbered_negatives(n: int) -> dict[str, Any]:
    return {"question": queries(n), "answer": answers(n), "negative_1": wrongs(n), "negative_2": wrongs(n + 100)}


def vlm2vec(n: int) -> dict[str, Any]:
    return {"qry": queries(n), "qry_image_path": "", "pos_text": answers(n), "pos_image_path": "",
            "neg_text": wrongs(n), "neg_image_path": ""}  # fmt: skip


TEXTS = {
    "flagembedding": flagembedding,
    "tevatron": tevatron,
    "ms-swift": swift_messages,
    "ms-swift: responses": swift_responses,
    "pairs": triplets,
    "pairs: numbered negatives": numbered_negatives,
    "vlm2vec": vlm2vec,
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_with_negatives_are_found(name, tmp_path, capsys):
    out = tmp_path / "out"
    import_dataset(write_jsonl(tmp_path / "train.jsonl", map(TEXTS[name], range(N))), out)
    assert capsys.readouterr().out.startswith(f"kind: {name.split(':')[0]}")
    assert found(out) == {(1, said(queries(n))): {said(answers(n))} for n in range(N)}
    for split in SPLITS:
        texts = {row["text"] for row in rows(out, split)}
        numbers = {int(text.split()[1].rstrip("?")) for text in texts}
        expected = {said(make(n)) for n in numbers for make in (answers, wrongs)}
        if "numbered" in name:
            expected |= {said(wrongs(n + 100)) for n in numbers}
        assert pooled(out)[1, split] == expected


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("flagembedding", "Answer it."),
        ("ms-swift", "Answer it."),
        ("tevatron", "Find a text that answers the query."),
        ("vlm2vec", None),
    ],
)
def test_a_rows_own_instruction_comes_before_the_default(name, instruction, tmp_path):
    import_dataset(write_jsonl(tmp_path / "train.jsonl", map(TEXTS[name], range(N))), tmp_path / "out")
    assert {row["instruction"] for row in rows(tmp_path / "out", "train")} == {instruction}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "folder"])
@pytest.mark.parametrize("columns", [("anchor", "positive"), ("query", "answer"), ("sentence1", "sentence2")])
def test_pairs_come_in_any_table(suffix, columns, tmp_path):
    lines = [(queries(n), answers(n)) for n in range(N)]
    file = tmp_path / "in" / f"pairs.{'parquet' if suffix == 'folder' else suffix}"
    file.parent.mkdir()
    if suffix in ("csv", "tsv"):
        write_csv(file, [columns, *lines], "," if suffix == "csv" else "\t")
    else:
        pq.write_table(pa.table(dict(zip(columns, zip(*lines, strict=True), strict=True))), file)
    import_dataset(file.parent if suffix == "folder" else file, tmp_path / "out")
    assert found(tmp_path / "out") == {(1, said(queries(n))): {said(answers(n))} for n in range(N)}


def test_queries_with_pictures_as_positives(tmp_path):
    """As visual document retrieval is published: a query, its page and other pages."""
    pages = pa.ListArray.from_arrays([*range(N + 1)], image_feature(range(50, 50 + N)))
    columns = {"query": pa.array(map(queries, range(N))), "image": image_feature(range(N)), "negatives": pages}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in" / "a.parquet")
    import_dataset(tmp_path / "in", tmp_path / "out")
    assert found(tmp_path / "out") == {(0, said(queries(n))): {shown(n)} for n in range(N)}
    pool = pooled(tmp_path / "out")[0, "train"]
    assert len(pool) == 2 * len(rows(tmp_path / "out", "train"))


def test_vlm2vec_with_pictures(tmp_path):
    write_pictures(tmp_path / "images", 3 * N)
    lines = [
        {
            "qry": "<|image_1|>\nThe same at night.",
            "qry_image_path": f"images/{n}.png",
            "pos_text": "<|image_1|>\n",
            "pos_image_path": f"images/{N + n}.png",
            "neg_text": ["<|image_1|>"],
            "neg_image_path": [f"images/{2 * N + n}.png"],
        }
        for n in range(N)
    ]
    import_dataset(write_jsonl(tmp_path / "a.jsonl", lines), tmp_path / "out")
    queries_ = {(7, ("The same at night.", (color(n),))): {shown(N + n)} for n in range(N)}
    assert found(tmp_path / "out") == queries_


def test_ms_swift_with_pictures_of_each_side(tmp_path):
    write_pictures(tmp_path, 5 * N)
    lines = [
        {
            "messages": [{"role": "user", "content": "<image>like this"}],
            "images": [f"{n}.png"],
            "positive_messages": [[{"role": "user", "content": "<image><image>"}]],
            "positive_images": [[f"{N + n}.png", f"{2 * N + n}.png"]],
            "negative_messages": [[{"role": "user", "content": "a text"}], [{"role": "user", "content": "<image>"}]],
            "negative_images": [[], [f"{3 * N + n}.png"]],
        }
        for n in range(N)
    ]
    import_dataset(write_jsonl(tmp_path / "a.jsonl", lines), tmp_path / "out")
    assert found(tmp_path / "out") == {(7, ("like this", (color(n),))): {shown(N + n, 2 * N + n)} for n in range(N)}
    assert said("a text") in pooled(tmp_path / "out")[7, "train"]


def test_ms_swift_with_pictures_in_one_list(tmp_path):
    """Placeholders take the pictures in the order query, response, rejected."""
    write_pictures(tmp_path, 3 * N)
    lines = [
        {"query": "<image>", "response": "<image>positive", "rejected_response": ["<image>negative"],
         "images": [f"{n}.png", f"{N + n}.png", {"bytes": None, "path": f"{2 * N + n}.png"}]}
        for n in range(N)
    ]  # fmt: skip
    import_dataset(write_jsonl(tmp_path / "a.jsonl", lines), tmp_path / "out")
    assert found(tmp_path / "out") == {(5, shown(n)): {("positive", (color(N + n),))} for n in range(N)}
    negatives = {key for split in SPLITS for key in pooled(tmp_path / "out")[5, split] if key[0] == "negative"}
    assert negatives == {("negative", (color(2 * N + n),)) for n in range(N)}


def test_a_label_says_whether_a_pair_matches(tmp_path):
    lines = [{"sentence1": queries(n), "sentence2": answers(n), "label": n % 2} for n in range(2 * N)]
    lines.append({"sentence1": "a", "sentence2": "b", "label": ""})
    import_dataset(write_jsonl(tmp_path / "a.jsonl", lines), tmp_path / "out")
    assert found(tmp_path / "out") == {(1, said(queries(n))): {said(answers(n))} for n in range(1, 2 * N, 2)}
    aside = reasons(tmp_path / "out")
    assert [row for _, row, reason in aside if reason.startswith("labelled as no match")] == [*range(1, 2 * N, 2)]
    assert aside[-1] == ("a.jsonl", 2 * N + 1, "no label: 'label' is empty")


@pytest.mark.parametrize("labels", [[5.0, 0.8, 3.2], [0, 1, 2], [1, "entailment"], ["1", "4.5"], [-1, 1], [True, [1]]])
def test_a_table_whose_labels_mean_something_else_is_refused(labels, tmp_path):
    """Scores from 0 to 5, three classes: what looks like a match would be none."""
    lines = [{"sentence1": queries(n), "sentence2": answers(n), "label": labels[n % len(labels)]} for n in range(N)]
    with pytest.raises(
        UserError, match=r"a.jsonl, row \d: 'label' is .*, not a number from 0 \(no match\) to 1; scale"
    ):
        import_dataset(write_jsonl(tmp_path / "a.jsonl", lines), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_equal_queries_and_documents_become_one(tmp_path):
    """Two captions of a picture, two pictures of a caption, and one picture in two encodings."""
    folder = tmp_path / "in"
    write_pictures(folder)
    (folder / "same.bmp").write_bytes(picture(0, "BMP"))
    lines = [("0.png", "red"), ("same.bmp", "crimson"), ("1.png", "two"), ("2.png", "two")]
    lines += [(f"{n}.png", f"thing {n}") for n in range(3, N)]
    write_csv(folder / "a.csv", [("file", "caption"), *lines])
    import_dataset(folder, tmp_path / "out")
    got = found(tmp_path / "out")
    assert got[3, shown(0)] == {said("red"), said("crimson")}
    assert got[0, said("two")] == {shown(1), shown(2)}
    assert len(rows(tmp_path / "out", "documents")) == 2 * N
    everything = [row["id"] for name in SPLITS for row in rows(tmp_path / "out", name)]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("name", [next(iter(CAPTIONED)), "ms-swift"])
def test_the_project_accepts_what_was_written(name, tmp_path):
    source = tmp_path / "in"
    path = CAPTIONED[name](source) if name in CAPTIONED else write_jsonl(source / "a.jsonl", map(TEXTS[name], range(N)))
    import_dataset(path, tmp_path / "out")
    dataset = open_dataset(Data(root=str(tmp_path / "out")), tmp_path / "cache")
    assert sum(dataset.queries(split).n for split in SPLITS) == len(found(tmp_path / "out"))
    for split in SPLITS:
        dataset.validate(split)
        dataset.check_pools(split)


def img2dataset(folder: Path) -> tuple[Path, str]:
    members = [(f"{n}.{part}", content) for n, text in enumerate(CAPTIONS)
               for part, content in (("png", picture(n)), ("txt", text.encode()), ("json", b"{}"))]  # fmt: skip
    write_tar(folder / "00000.tar", members)
    pq.write_table(pa.table({"url": ["a"], "caption": ["b"], "status": ["success"]}), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text('{"count": 12}')
    return folder, "webdataset"


def loose_files_with_json_each(folder: Path) -> tuple[Path, str]:
    text_files_beside_the_pictures(folder)
    for n in range(N):
        (folder / "a" / f"{n}.json").write_text('{"width": 9}')
    return folder / "a", "sidecars"


def json_of_something_else_beside_each_picture(folder: Path) -> tuple[Path, str]:
    names = write_pictures(folder)
    for n in range(N):
        (folder / f"{n}.json").write_text('{"width": 9}')
    (folder / "captions.json").write_text(
        json.dumps([{"file": name, "caption": text} for name, text in zip(names, CAPTIONS, strict=True)])
    )
    return folder, "captions"


def notes_beside_json_files(folder: Path) -> tuple[Path, str]:
    json_files_beside_the_pictures(folder)
    (folder / "README.txt").write_text("read me")
    return folder, "sidecars"


def a_clone_of_a_dataset_repository(folder: Path) -> tuple[Path, str]:
    a_folder_of_parquet(folder)
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "a.csv").write_text("x,y\n1,2\n")
    return folder, "captions"


def a_table_with_the_same_pictures_packed(folder: Path) -> tuple[Path, str]:
    a_csv_beside_the_pictures(folder)
    write_tar(folder / "backup.tar", [(f"{n}.png", picture(n)) for n in range(N)])
    return folder, "captions"


def a_table_of_something_else(folder: Path) -> tuple[Path, str]:
    a_csv_beside_the_pictures(folder)
    write_csv(folder / "a-classes.csv", [("name", "n"), ("a", 1)])
    return folder, "captions"


def notes_beside_text_files(folder: Path) -> tuple[Path, str]:
    text_files_beside_the_pictures(folder)
    write_csv(folder / "notes.csv", [("a", "b"), ("1", "2")])
    return folder, "sidecars"


def numbers_above_the_data(folder: Path) -> tuple[Path, str]:
    a_folder_of_parquet(folder)
    write_csv(folder / "stats.csv", [("a", "b"), ("1", "2")])
    return folder, "captions"


LEFT = {
    img2dataset: "not read: 00000.parquet",
    loose_files_with_json_each: "",
    json_of_something_else_beside_each_picture: "not read: 0.json, 1.json, 10.json, 11.json, 2.json, 3.json, 4.json, "
    "5.json, 6.json, 7.json and 2 more",
    notes_beside_json_files: "not read: README.txt",
    a_clone_of_a_dataset_repository: "",
    a_table_with_the_same_pictures_packed: "not read: backup.tar",
    a_table_of_something_else: "not read: a-classes.csv",
    notes_beside_text_files: "not read: notes.csv",
    numbers_above_the_data: "not read: stats.csv",
}


@pytest.mark.parametrize("make", LEFT)
def test_files_that_lie_beside_the_data_do_not_confuse(make, tmp_path, capsys):
    source, kind = make(tmp_path / "in")
    import_dataset(source, tmp_path / "out")
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"kind: {kind}")
    assert second == LEFT[make] or (not LEFT[make] and second.startswith("rows: "))
    assert found(tmp_path / "out") == TRUTH


def test_a_question_about_a_picture_has_both(tmp_path, capsys):
    names = write_pictures(tmp_path / "in")
    lines = [(name, queries(n), answers(n), "x") for n, name in enumerate(names)]
    write_csv(tmp_path / "in" / "a.csv", [("image", "question", "answer", "split"), *lines])
    import_dataset(tmp_path / "in", tmp_path / "out")
    assert found(tmp_path / "out") == {(6, (queries(n), (color(n),))): {said(answers(n))} for n in range(N)}
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "kind: pairs (query from 'question' with the picture in 'image', positive from 'answer')"
    assert second == "columns not used: split"


def test_several_pictures_with_a_caption_are_one_item(tmp_path):
    pictures = pa.ListArray.from_arrays([*range(0, 2 * N + 1, 2)], image_feature(range(2 * N)))
    pq.write_table(pa.table({"images": pictures, "caption": CAPTIONS}), tmp_path / "a.parquet")
    import_dataset(tmp_path / "a.parquet", tmp_path / "out")
    shown_ = {(0, said(text)): {shown(2 * n, 2 * n + 1)} for n, text in enumerate(CAPTIONS)}
    assert {key: value for key, value in found(tmp_path / "out").items() if key[0] == 0} == shown_


def test_a_picture_is_called_what_its_file_is_called(tmp_path):
    folder = tmp_path / "in"
    write_pictures(folder / "a b")
    lines = [(f"a b/{n}.png", text) for n, text in enumerate(CAPTIONS)]
    (folder / "a b" / "other.png").write_bytes(picture(50))
    lines.append(("a b/other.png", "another"))
    write_csv(folder / "a.csv", [("file", "caption"), *lines, ("a b/0.png", "again")])
    import_dataset(folder, tmp_path / "out")
    names = {row["id"]: key_of(row) for row in rows(tmp_path / "out", "documents") if row["image"]}
    assert names == {f"a_b/{n}.png": shown(n) for n in range(N)} | {"a_b/other.png": shown(50)}
