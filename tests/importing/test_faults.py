"""What cannot be used: rows are set aside with file, row and reason; other mistakes are one line."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.importing.sources import (
    CAPTIONS,
    N,
    found,
    picture,
    pooled,
    reasons,
    said,
    shown,
    write_csv,
    write_jsonl,
    write_pictures,
    write_saved,
    write_tar,
)
from umarvel_ray.cli import main
from umarvel_ray.errors import UserError
from umarvel_ray.importing.importer import import_dataset
from umarvel_ray.train.quarantine import QUARANTINE


def captioned(folder: Path, lines: list[tuple], header: tuple = ("id", "file", "caption")) -> Path:
    """Good rows, and after them others."""
    names = write_pictures(folder)
    good = [(f"g{number}", name, text) for number, (name, text) in enumerate(zip(names, CAPTIONS, strict=True))]
    write_csv(folder / "a.csv", [header, *good, *lines])
    return folder


def test_pictures_and_captions_that_cannot_be_used_are_set_aside(tmp_path, capsys):
    folder = tmp_path / "in"
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    lines = [
        ("x1", "gone.png", "a"),
        ("x2", "cut.png", "b"),
        ("x3", "text.png", "c"),
        ("x4", "0.png", "   "),
        ("x5", "", "e"),
        ("x6", "https://example.org/a.png", "f"),
        ("x7", "only two cells"),
    ]
    captioned(folder, lines)
    (folder / "cut.png").write_bytes(whole.getvalue()[:-300])
    (folder / "text.png").write_text("no picture")
    import_dataset(folder, tmp_path / "out")
    assert len(found(tmp_path / "out")) == 2 * N
    table = pq.read_table(tmp_path / "out" / "quarantine" / "import.parquet")
    assert table.schema.equals(QUARANTINE)
    assert table["id"].to_pylist() == ["x1", "x2", "x3", "x4", "x5", "x6", ""]
    aside = reasons(tmp_path / "out")
    assert [(file, row) for file, row, _ in aside] == [("a.csv", N + 2 + number) for number in range(7)]
    starts = (
        "picture not found: ",
        "unreadable picture: picture cannot be read",
        "unreadable picture: not a picture",
        "empty text",
        "no picture: column 'file' is empty",
        "unreadable picture: picture URLs",
        "wrong number of cells: 2 under 3",
    )
    for (_, _, reason), start in zip(aside, starts, strict=True):
        assert reason.startswith(start)
    output = capsys.readouterr().out
    assert f"rows: {N + 7} read, {N} kept, 7 set aside\n  3 × unreadable picture\n" in output


def test_only_what_is_unusable_of_a_row_is_left_out(tmp_path):
    lines = [{"query": f"q{n}", "pos": [f"p{n}", " "], "neg": ["", f"n{n}"]} for n in range(N)]
    lines += [
        {"query": "", "pos": ["p"]},
        {"query": "alone", "pos": [], "neg": ["n"]},
        {"query": "same", "pos": ["same"]},
    ]
    lines += [{"query": "wrong", "pos": [True]}, {"query": "no answer"}]
    import_dataset(write_jsonl(tmp_path / "a.jsonl", lines), tmp_path / "out")
    assert found(tmp_path / "out") == {(1, said(f"q{n}")): {said(f"p{n}")} for n in range(N)}
    assert not any(key[0] in ("", "n", "p", "same") for keys in pooled(tmp_path / "out").values() for key in keys)
    aside = [(row, reason) for _, row, reason in reasons(tmp_path / "out")]
    assert aside[: 2 * N] == [(n + 1, "empty text") for n in range(N) for _ in range(2)]
    assert aside[2 * N :] == [
        (N + 1, "empty text"),
        (N + 2, "no positive"),
        (N + 3, "the positive is the query itself"),
        (N + 4, "wrong type: 'pos' holds bool, not text"),
        (N + 5, "no positive"),
    ]


def test_lines_that_are_no_json_objects_are_set_aside(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"query": f"q{n}", "pos": [f"p{n}"]} for n in range(N)])
    with file.open("a") as handle:
        handle.write('\n{"query": "cut", "pos": ["\n[1]\n"text"\n' + "[" * 100_000 + "\n")
    import_dataset(file, tmp_path / "out")
    aside = [(row, reason.split(":")[0]) for _, row, reason in reasons(tmp_path / "out")]
    kinds = ["not valid JSON", "not a JSON object", "not a JSON object", "not valid JSON"]
    assert aside == list(zip(range(N + 2, N + 6), kinds, strict=True))


def test_samples_of_tar_files_without_a_picture_or_text_are_set_aside(tmp_path):
    members = [(f"{n}.{part}", content) for n in range(N)
               for part, content in (("png", picture(n)), ("caption", CAPTIONS[n].encode()))]  # fmt: skip
    members += [("a.png", picture(50)), ("b.txt", b"alone"), ("c.png", picture(51)), ("c.json", b"{"),
                ("d.png", picture(52)), ("d.json", b'{"width": 3}')]  # fmt: skip
    write_tar(tmp_path / "in" / "a.tar", members)
    whole = (tmp_path / "in" / "a.tar").read_bytes()
    (tmp_path / "in" / "b.tar").write_bytes(whole[: whole.index(picture(5)) + 30])
    import_dataset(tmp_path / "in", tmp_path / "out")
    assert len(found(tmp_path / "out")) == 2 * N
    aside = reasons(tmp_path / "out")
    assert [(file, row, reason.split(":")[0]) for file, row, reason in aside[:4]] == [
        ("a.tar", N + 1, "no caption"),
        ("a.tar", N + 2, "no picture"),
        ("a.tar", N + 3, "not valid JSON"),
        ("a.tar", N + 4, "no caption"),
    ]
    assert aside[4:] == [("b.tar", 6, "tar file ends early or is damaged: unexpected end of data")]


def test_pictures_without_a_text_file_are_set_aside(tmp_path):
    for name, text in zip(write_pictures(tmp_path / "in"), CAPTIONS, strict=True):
        (tmp_path / "in" / name).with_suffix(".txt").write_text(text)
    (tmp_path / "in" / "0.txt").write_text("\n")
    (tmp_path / "in" / "1.txt").unlink()
    import_dataset(tmp_path / "in", tmp_path / "out")
    assert reasons(tmp_path / "out") == [("0.png", 1, "empty text"), ("1.png", 2, "no caption: 1.txt is missing")]


@pytest.mark.parametrize("placeholders", ["<image><image>", "none"])
def test_placeholders_must_match_the_pictures(placeholders, tmp_path):
    write_pictures(tmp_path)
    lines = [{"query": "<image>", "response": f"a{n}", "images": [f"{n}.png"]} for n in range(N)]
    lines.append({"query": placeholders, "response": "a", "images": ["0.png"]})
    import_dataset(write_jsonl(tmp_path / "a.jsonl", lines), tmp_path / "out")
    assert [reason.split(":")[0] for _, _, reason in reasons(tmp_path / "out")] == ["wrong number of pictures"]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le with mark", "utf-32", "cp1252"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_encodings(encoding, kind, tmp_path, capsys):
    folder = tmp_path / "in"
    names = write_pictures(folder)
    texts = [f"Café №{n} – “ok”" if encoding != "cp1252" else f"Café {n} – “ok” €" for n in range(N)]

    def write(file: Path, text: str) -> None:
        name, mark, _ = encoding.partition(" ")
        file.write_bytes((f"\ufeff{text}" if mark else text).encode(name))

    if kind == "csv":
        write(
            folder / "a.csv", "file,caption\r\n" + "".join(f'{a},"{b}"\r\n' for a, b in zip(names, texts, strict=True))
        )
    elif kind == "jsonl":
        lines = [{"file_name": a, "text": b} for a, b in zip(names, texts, strict=True)]
        write(folder / "a.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    else:
        for name, text in zip(names, texts, strict=True):
            write((folder / name).with_suffix(".txt"), text)
    import_dataset(folder, tmp_path / "out")
    assert found(tmp_path / "out") == {(0, said(text)): {shown(n)} for n, text in enumerate(texts)} | {
        (3, shown(n)): {said(text)} for n, text in enumerate(texts)
    }
    told = [line for line in capsys.readouterr().out.splitlines() if "not UTF-8" in line]
    expected = (
        [f"a.{kind}: not UTF-8, read as cp1252"] if kind != "txt" else [f"{N} text files: not UTF-8, read as cp1252"]
    )
    assert told == (expected if encoding == "cp1252" else [])


def test_quoted_cells_may_hold_delimiters_quotes_and_lines(tmp_path):
    texts = [f'a "{n}", b;\nnext\tline {"x" * 200_000}' for n in range(N)]
    write_csv(tmp_path / "in.csv", [("query", "answer"), *((f"q{n}", text) for n, text in enumerate(texts))])
    import_dataset(tmp_path / "in.csv", tmp_path / "out")
    assert found(tmp_path / "out") == {(1, said(f"q{n}")): {said(text)} for n, text in enumerate(texts)}


def empty_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def pictures_alone(folder: Path) -> Path:
    write_pictures(folder)
    return folder


def unknown_columns(folder: Path) -> Path:
    return write_jsonl(folder / "a.jsonl", [{"left": 1, "right": 2}])


def two_kinds(folder: Path) -> Path:
    write_jsonl(folder / "a.jsonl", [{"query": "q", "pos": ["p"]}])
    write_jsonl(folder / "b.jsonl", [{"anchor": "q", "positive": "p"}])
    return folder


def ids_of_another_file(folder: Path) -> Path:
    return write_jsonl(folder / "a.jsonl", [{"query_id": "1", "query_text": "q", "positive_document_ids": ["3"]}])


def only_unusable_rows(folder: Path) -> Path:
    return write_jsonl(folder / "a.jsonl", [{"query": "", "pos": ["p"]}])


def no_parquet(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.parquet").write_text("no")
    return folder


def no_arrow(folder: Path) -> Path:
    import pyarrow as pa

    write_saved(folder, pa.table({"query": ["a"], "answer": ["b"]}), shards=1)
    (folder / "data-00000-of-00001.arrow").write_text("no Arrow stream")
    return folder


def lost_arrow(folder: Path) -> Path:
    no_arrow(folder)
    (folder / "data-00000-of-00001.arrow").unlink()
    return folder


def empty_csv(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.csv").touch()
    return folder


def no_json(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.json").write_text('[{"query": "a"}')
    return folder


def too_few(folder: Path) -> Path:
    return write_jsonl(folder / "a.jsonl", [{"query": "a", "pos": ["b"]}, {"query": "c", "pos": ["d"]}])


def too_few_to_train(folder: Path) -> Path:
    return write_jsonl(folder / "a.jsonl", [{"query": f"a{n}", "pos": [f"b{n}"]} for n in range(4)])


def mostly_unusable(folder: Path) -> Path:
    return write_jsonl(folder / "a.jsonl", [{"query": f"a{n}", "pos": [] if n else ["b"]} for n in range(10)])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nowhere", ["nowhere", "not found"]),
        (empty_folder, ["in", "nothing to import", "captions"]),
        (pictures_alone, ["nothing to import", "captions"]),
        (unknown_columns, ["a.jsonl", "left, right", "rename"]),
        (two_kinds, ["a.jsonl", "flagembedding", "b.jsonl", "pairs"]),
        (ids_of_another_file, ["a.jsonl", "positive_passages"]),
        (only_unusable_rows, ["none of 1 rows", "a.jsonl, row 1", "empty text"]),
        (no_parquet, ["a.parquet", "not a readable Parquet file"]),
        (no_arrow, ["data-00000-of-00001.arrow", "not an Arrow stream"]),
        (lost_arrow, ["data-00000-of-00001.arrow", "not found"]),
        (empty_csv, ["a.csv", "empty"]),
        (no_json, ["a.json", "not valid JSON"]),
        (too_few, ["2 queries", "other content"]),
        (too_few_to_train, ["no task has 4 queries", "but 2", "add rows"]),
        (mostly_unusable, ["1 groups", "9 of 10 rows were set aside", "a.jsonl, row 2: no positive"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(make, words, tmp_path, capsys):
    source = make(tmp_path / "in")
    assert main(["import", str(source), "--to", str(tmp_path / "out")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    for word in words:
        assert word in line
    assert {path.name for path in tmp_path.iterdir()} <= {"in"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "magic"], ["magic", "webdataset"]),
        (["--kind", "webdataset"], ["no tar files"]),
        (["--kind", "pairs"], ["none of 12 rows", "no query"]),
        (["--holdout", "all"], ["--holdout all"]),
        (["--instruction", "task9=Find it."], ["task9", "task0 (text → image)"]),
        (["--seed", "x"], ["--seed"]),
    ],
)
def test_a_wrong_option_is_one_line(arguments, words, tmp_path, capsys):
    captioned(tmp_path / "in", [])
    assert main(["import", str(tmp_path / "in"), "--to", str(tmp_path / "out"), *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(tmp_path):
    captioned(tmp_path / "in", [])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    with pytest.raises(UserError, match="not an empty folder; give --to another one"):
        import_dataset(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="is inside"):
        import_dataset(tmp_path / "in", tmp_path / "in" / "out")
    (tmp_path / "out" / "a").unlink()
    import_dataset(tmp_path / "in", tmp_path / "out")
    assert found(tmp_path / "out")


def test_text_that_utf8_cannot_hold_or_that_shows_nothing(tmp_path):
    """Half characters, as in JSON that was cut, and names of files that are not UTF-8."""
    rows = [{"query": f"what is {n}?", "pos": [f"it is {n} \ud83d"]} for n in range(12)]
    rows += [{"query": "\u200b", "pos": ["blank"]}, {"query": "good", "pos": ["\u2060 \u200d"]}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import_dataset(tmp_path / "pairs.jsonl", tmp_path / "out")
    texts = pq.read_table(tmp_path / "out/documents.parquet")["text"].to_pylist()
    assert sorted(texts) == sorted(f"it is {n} \ufffd" for n in range(12))
    reasons = pq.read_table(tmp_path / "out/quarantine/import.parquet")["reason"].to_pylist()
    assert len(reasons) == 2


def test_names_of_files_that_are_not_utf8(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(12):
        name = os.fsencode(folder) + b"/\xff%d" % n
        with open(name + b".png", "wb") as file:
            Image.new("RGB", (8 + n, 8)).save(file, "PNG")
        with open(name + b".txt", "w") as file:
            file.write(f"picture {n}" if n else " ")
    import_dataset(folder, tmp_path / "out")
    ids = pq.read_table(tmp_path / "out/documents.parquet")["id"].to_pylist()
    assert sum("\ufffd" in id_ for id_ in ids) == 11
    assert pq.read_table(tmp_path / "out/quarantine/import.parquet").num_rows == 1
