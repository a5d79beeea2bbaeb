"""What cannot be used: rows are set aside with file, row and reason; other mistakes are one line."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
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
from umarvel_ray.importing.tables import rows_of
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


def deep_json(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.json").write_text("[" * 100_000)
    return folder


def lines_of(folder: Path, text: str, name: str = "a.jsonl") -> Path:
    folder.mkdir()
    (folder / name).write_text(text)
    return folder


def json_over_several_lines(folder: Path) -> Path:
    return lines_of(folder, json.dumps({"query": "a", "pos": ["b"]}, indent=1))


def json_with_commas(folder: Path) -> Path:
    return lines_of(folder, '{"query": "a", "pos": ["b"]},\n{"query": "c", "pos": ["d"]}\n')


def broken_json_lines(folder: Path) -> Path:
    return lines_of(folder, '{"query": "a"\n{"query": "c"\n')


def no_json_lines(folder: Path) -> Path:
    return lines_of(folder, "\n")


def a_header_alone(folder: Path) -> Path:
    return lines_of(folder, "file,caption\n", "a.csv")


def a_column_twice(folder: Path) -> Path:
    return lines_of(folder, "file,caption,note,note,caption\n0.png,a,,,b\n", "a.csv")


def columns_alike(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(pa.table({"image": ["a"], "Caption": ["b"], "caption": [None]}), folder / "a.parquet")
    return folder


def keys_alike(folder: Path) -> Path:
    return lines_of(folder, '{"Query": "a", "query": "b", "pos": ["c"]}\n')


def a_spreadsheet(folder: Path) -> Path:
    write_pictures(folder)
    (folder / "list.xlsx").write_bytes(b"PK\x03\x04")
    return folder


def a_renamed_spreadsheet(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.csv").write_bytes(b"PK\x03\x04" + bytes(range(256)))
    return folder


def a_zip(folder: Path) -> Path:
    folder.mkdir()
    (folder / "all.zip").write_bytes(b"PK\x03\x04")
    return folder / "all.zip"


def a_damaged_gz(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.csv.gz").write_bytes(gzip.compress(b"file,caption\n" * 1000)[:-20])
    return folder


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
        (deep_json, ["a.json", "not valid JSON", "recursion"]),
        (json_over_several_lines, ["a.jsonl", "not JSON Lines", "in a line of its own"]),
        (json_with_commas, ["a.jsonl", "not JSON Lines", "without a comma"]),
        (broken_json_lines, ["a.jsonl, row 1: not valid JSON"]),
        (no_json_lines, ["a.jsonl", "empty; add rows"]),
        (a_header_alone, ["in", "no rows; add some"]),
        (a_column_twice, ["a.csv", "the columns 'caption' and 'caption' count as one"]),
        (columns_alike, ["a.parquet", "the columns 'Caption' and 'caption' count as one"]),
        (keys_alike, ["a.jsonl, row 1", "the columns 'Query' and 'query' count as one"]),
        (a_spreadsheet, ["list.xlsx: a spreadsheet; save it as CSV"]),
        (a_renamed_spreadsheet, ["a.csv: a spreadsheet or another packed file"]),
        (a_zip, ["all.zip: packed; unpack it"]),
        (a_damaged_gz, ["a.csv.gz: cannot be read"]),
        (too_few, ["2 queries", "other content"]),
        (too_few_to_train, ["no task has 4 queries", "but 2", "add rows"]),
        (mostly_unusable, ["found 1", "9 of 10 rows were set aside", "a.jsonl, row 2: no positive"]),
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
        (["--kind", "pairs"], ["a.csv", "'pairs' needs other columns than (id, file, caption)"]),
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


@pytest.mark.parametrize("packed", [False, True])
def test_which_key_of_a_json_holds_the_caption_is_asked_for_in_one_line(packed, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    lines = [{key: f"{key} {n}" for key in ("title", "description", "note")} for n in range(N)]
    if packed:
        members = [(f"{n}.{part}", content) for n, line in enumerate(lines)
                   for part, content in (("png", picture(n)), ("json", json.dumps(line).encode()))]  # fmt: skip
        write_tar(folder / "a.tar", members)
    else:
        for name, line in zip(write_pictures(folder), lines, strict=True):
            (folder / name).with_suffix(".json").write_text(json.dumps(line))
    assert main(["import", str(folder), "--to", str(out)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "may be under 'description' or 'title'; say which: --caption description" in line
    assert line.startswith(f"umarvel: {folder / ('a.tar, 0' if packed else '0.json')}: ")
    assert not out.exists()
    for key, start in (("title", "title"), ("Note", "note")):
        assert main(["import", str(folder), "--to", str(out / key), "--caption", key]) == 0
        assert {text for task, (text, _) in found(out / key) if task == 0} == {f"{start} {n}" for n in range(N)}


def test_a_key_for_captions_is_of_json_files_only(tmp_path):
    captioned(tmp_path / "in", [])
    with pytest.raises(UserError, match=r"--caption title: is for the JSON of each picture; name the table's column"):
        import_dataset(tmp_path / "in", tmp_path / "out", caption="title")


def test_json_files_beside_pictures_that_say_nothing_are_set_aside(tmp_path):
    folder = tmp_path / "in"
    texts = [f'{{"caption": "a {n}"}}' for n in range(N)]
    texts += ["{", '{"width": 9}', '{"caption": "", "title": null}', "7"]
    for name, text in zip(write_pictures(folder, len(texts)), texts, strict=True):
        (folder / name).with_suffix(".json").write_text(text)
    import_dataset(folder, tmp_path / "out")
    aside = sorted(reason for _, _, reason in reasons(tmp_path / "out"))
    assert [reason.partition(":")[0] for reason in aside] == ["no caption"] * 3 + ["not valid JSON"]


def test_a_compressed_tar_file_that_is_not_sorted_is_one_line(tmp_path):
    members = [(f"{n}.png", picture(n)) for n in range(N)] + [(f"{n}.txt", b"a %d" % n) for n in range(N)]
    write_tar(tmp_path / "a.tar.gz", members)
    with pytest.raises(UserError, match=r"a\.tar\.gz: the files of '0' are not next to each other; unpack it"):
        import_dataset(tmp_path / "a.tar.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_samples_of_one_name_are_never_mixed_up(name, tmp_path):
    """As a tar file has them into which several were unpacked: whole ones stay apart."""
    whole = [(f"{n % 6}.{part}", content) for n in range(N)
             for part, content in (("png", picture(n)), ("txt", b"a %d" % n))]  # fmt: skip
    write_tar(tmp_path / "in" / name, whole)
    import_dataset(tmp_path / "in", tmp_path / "out")
    pairs = {text: positives for (task, (text, _)), positives in found(tmp_path / "out").items() if task == 0}
    assert pairs == {f"a {n}": {shown(n)} for n in range(N)}


def test_pictures_of_one_name_twice_in_an_unsorted_tar_file_are_set_aside(tmp_path):
    members = [(f"{n}.png", picture(n)) for n in range(N)] + [("0.png", picture(50)), ("1.png", picture(1))]
    members += [(f"{n}.txt", b"a %d" % n) for n in range(N)] + [("0.txt", b"another")]
    write_tar(tmp_path / "in" / "a.tar", members)
    import_dataset(tmp_path / "in", tmp_path / "out")
    assert reasons(tmp_path / "out") == [("a.tar", row, "two files of one name: part png") for row in (1, 2)]
    pairs = {text: positives for (task, (text, _)), positives in found(tmp_path / "out").items() if task == 0}
    assert pairs == {f"a {n}": {shown(n)} for n in range(2, N)}


def test_an_unsorted_tar_file_that_ends_early_gives_what_is_whole(tmp_path):
    members = [(f"{n}.png", picture(n)) for n in range(N)] + [(f"{n}.txt", b"a %d" % n) for n in range(N)]
    write_tar(tmp_path / "whole.tar", members)
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(content[: content.index(b"a 9") + 1])
    import_dataset(tmp_path / "in", tmp_path / "out")
    assert {text for task, (text, _) in found(tmp_path / "out") if task == 0} == {f"a {n}" for n in range(9)}
    assert any("ends early" in reason for _, _, reason in reasons(tmp_path / "out"))


def test_of_joined_tar_files_nothing_is_lost_without_a_word(tmp_path):
    contents = []
    for start in (0, N):
        members = [(f"{n}.{part}", content) for n in range(start, start + N)
                   for part, content in (("png", picture(n)), ("txt", b"a %d" % n))]  # fmt: skip
        write_tar(tmp_path / "one.tar", members)
        contents.append((tmp_path / "one.tar").read_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(b"".join(contents))
    import_dataset(tmp_path / "in", tmp_path / "out")
    [(file, row, reason)] = reasons(tmp_path / "out")
    assert (file, row) == ("a.tar", N + 1)
    assert "more follows after its end" in reason


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


def test_a_quote_that_is_not_closed_costs_its_own_row(tmp_path):
    """Not those that follow, up to the next quote or to the end."""
    folder = tmp_path / "in"
    names = write_pictures(folder, 16)
    cells = {
        2: '"thing 2',
        5: 'a 5" disk',
        7: '"said" he 7',
        9: '"two\nlines"',
        11: '"thing 11',
        13: 'of 13""',
        15: '"x',
    }
    lines = (f"{name},{cells.get(n, f'thing {n}')}\n" for n, name in enumerate(names))
    (folder / "a.csv").write_text("file,caption\n" + "".join(lines))
    import_dataset(folder, tmp_path / "out")
    kept = {key[0] for task, key in found(tmp_path / "out") if task == 0}
    whole = {f"thing {n}" for n in range(16) if n not in cells}
    assert kept == whole | {'a 5" disk', "two\nlines", 'of 13""'}
    aside = reasons(tmp_path / "out")
    assert [row for _, row, _ in aside] == [4, 9, 14, 18]
    assert all(reason.startswith("quote that is not closed") for _, _, reason in aside)


def test_rows_inside_a_cell_are_not_its_text(tmp_path):
    folder = tmp_path / "in"
    names = write_pictures(folder)
    cells = {2: '"a screen', 6: 'of 5"'}
    lines = (f"{name},{cells.get(n, f'thing {n}')}\n" for n, name in enumerate(names))
    (folder / "a.csv").write_text("file,caption\n" + "".join(lines))
    import_dataset(folder, tmp_path / "out")
    assert len(found(tmp_path / "out")) == 2 * (N - 1)
    assert [row for _, row, _ in reasons(tmp_path / "out")] == [4]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12), min_size=1, max_size=8))
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("csv") / "a.csv"
    write_csv(file, [("query", "answer"), *((f"q{n}", text) for n, text in enumerate(texts))])
    read = [row for _, row in rows_of(file)]
    assert read == [{"query": f"q{n}", "answer": text} for n, text in enumerate(texts)]


@pytest.mark.parametrize("quotes", [{3}, {3, 9}, {3, 4}, set(range(N))])
def test_tab_separated_texts_may_begin_with_a_quote(quotes, tmp_path):
    texts = [f'"Go {n}, said he' if n in quotes else f"thing {n}" for n in range(N)]
    file = tmp_path / "a.tsv"
    file.write_text("query\tanswer\n" + "".join(f"q{n}\t{text}\n" for n, text in enumerate(texts)))
    import_dataset(file, tmp_path / "out")
    assert found(tmp_path / "out") == {(1, said(f"q{n}")): {said(text)} for n, text in enumerate(texts)}


def test_what_spreadsheets_add_is_skipped(tmp_path):
    """The line that names the delimiter, and empty cells at the end of rows."""
    file = tmp_path / "a.csv"
    lines = "".join(f"q{n};a,{n};;\n" for n in range(N))
    file.write_text(f"sep=;\nquery;answer\n{lines}", encoding="utf-8-sig")
    import_dataset(file, tmp_path / "out")
    assert found(tmp_path / "out") == {(1, said(f"q{n}")): {said(f"a,{n}")} for n in range(N)}
    assert not (tmp_path / "out" / "quarantine").exists()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark(encoding, tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(("query,answer\r\n" + "".join(f"q{n},é {n}\r\n" for n in range(N))).encode(encoding))
    import_dataset(file, tmp_path / "out")
    assert found(tmp_path / "out") == {(1, said(f"q{n}")): {said(f"é {n}")} for n in range(N)}


def test_values_that_python_cannot_hold(tmp_path, capsys):
    """In columns that are not used they do not matter; in others they cost their row."""
    answers = pa.array([b"caf\xe9" if n == 4 else b"a%d" % n for n in range(N)], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), N, answers.buffers())
    columns = {
        "query": [f"q{n}" for n in range(N)],
        "answer": bad,
        "note": bad,
        "seen": pa.array([2**62] * N, pa.timestamp("us")),
        "day": pa.array([10**7] * N, pa.date32()),
        "there": pa.array([1] * N, pa.timestamp("us", "Mars/Phobos")),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    write_saved(tmp_path / "saved", pa.table(columns))
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        out = tmp_path / f"out-{source.name}"
        import_dataset(source, out)
        assert found(out) == {(1, said(f"q{n}")): {said(f"a{n}")} for n in range(N) if n != 4}
        [(_, _, reason)] = reasons(out)
        assert reason.startswith("value that cannot be read: 'utf-8' codec")
        assert "columns not used: note, seen, day, there\n" in capsys.readouterr().out


def test_deeply_nested_values(tmp_path):
    deep = "[" * 900 + "]" * 900
    lines = [f'{{"query": "q{n}", "pos": ["p{n}"], "meta": {deep}}}\n' for n in range(N)]
    (tmp_path / "a.jsonl").write_text("".join(lines) + f'{{"query": "x", "pos": {deep}}}\n')
    import_dataset(tmp_path / "a.jsonl", tmp_path / "out")
    assert found(tmp_path / "out") == {(1, said(f"q{n}")): {said(f"p{n}")} for n in range(N)}
    assert len(reasons(tmp_path / "out")) == 1
