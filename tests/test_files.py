"""Atomic writes: whole or not at all, when a write fails, when its process dies, and with several writers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from umarvel_ray.files import atomic_folder, atomic_path, write_json, write_text


@pytest.fixture(params=[False, True], ids=["plain", "durable"])
def durable(request) -> bool:
    return request.param


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def fail(_written: object, error: type[BaseException]) -> None:
    raise error


def die_while_writing(code: str) -> None:
    """Run code in a process that ends as if killed."""
    head = "import os\nfrom umarvel_ray.files import atomic_folder, atomic_path\n"
    process = subprocess.run([sys.executable, "-c", head + code], check=False, timeout=60)
    assert process.returncode == 9


def test_a_file_is_replaced_when_the_block_ends(tmp_path, durable):
    path = tmp_path / "deep" / "a.txt"
    for text in ("old", "new"):
        with atomic_path(path, durable) as partial:
            partial.write_text(text)
            assert partial.parent == path.parent
            assert path.exists() == (text == "new")
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failed_write_leaves_the_old_file_and_no_partial_one(tmp_path, durable, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path, durable) as partial:
        fail(partial.write_text("half"), error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path, durable):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(path, durable):
        pass
    assert path.read_text() == "old"


def test_a_process_that_dies_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    die_while_writing(f"with atomic_path({str(path)!r}) as partial:\n    partial.write_text('half')\n    os._exit(9)")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.glob("*.txt")] == ["a.txt"]


def test_what_a_killed_process_left_is_removed_after_an_hour(tmp_path):
    old, fresh, other = (
        tmp_path / f".{name}.partial" for name in ("a.txt.11111111", "a.txt.22222222", "b.txt.33333333")
    )
    for partial in (old, fresh, other):
        partial.write_text("half")
    hours_ago = time.time() - 2 * 3600
    for partial in (old, other):
        os.utime(partial, (hours_ago, hours_ago))
    write_text(tmp_path / "a.txt", "whole")
    assert names(tmp_path) == sorted([fresh.name, other.name, "a.txt"])


def test_text_is_utf_8_and_json_reads_back(tmp_path, durable):
    write_text(tmp_path / "a.txt", "Größe 日本\n", durable)
    assert (tmp_path / "a.txt").read_bytes() == "Größe 日本\n".encode()
    value = {"a": [1, 2.5, None], "b": "日本"}
    write_json(tmp_path / "a.json", value, durable=durable)
    assert json.loads((tmp_path / "a.json").read_text()) == value
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()}, durable=durable)
    assert json.loads((tmp_path / "a.json").read_text()) == value


def test_readers_see_one_writers_whole_file(tmp_path):
    path = tmp_path / "a.txt"
    texts = [f"{writer}" * 200_000 for writer in range(8)]
    write_text(path, texts[0])

    def write(text: str) -> None:
        for _ in range(10):
            write_text(path, text)

    with ThreadPoolExecutor(len(texts)) as threads:
        writers = [threads.submit(write, text) for text in texts]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in texts
        for writer in writers:
            writer.result()
    assert path.read_text() in texts
    assert names(tmp_path) == ["a.txt"]


def fill(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def test_a_folder_is_replaced_when_the_block_ends(tmp_path):
    folder = tmp_path / "deep" / "model"
    with atomic_folder(folder) as fresh:
        fill(fresh, a="old", b="old")
        assert not folder.exists()
    with atomic_folder(folder) as fresh:
        fill(fresh, a="new")
        assert names(folder) == ["a", "b"]
    assert names(folder) == ["a"]
    assert (folder / "a").read_text() == "new"
    assert names(folder.parent) == ["model"]


def test_a_failed_folder_leaves_the_old_one_and_the_next_attempt_starts_empty(tmp_path):
    folder = tmp_path / "model"
    with atomic_folder(folder) as fresh:
        fill(fresh, a="old")
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as fresh:
        fail(fill(fresh, b="half"), ZeroDivisionError)
    assert names(folder) == ["a"]
    with atomic_folder(folder) as fresh:
        assert names(fresh) == []
        fill(fresh, c="new")
    assert names(folder) == ["c"]
    assert names(tmp_path) == ["model"]


def test_a_process_that_dies_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "model"
    with atomic_folder(folder) as fresh:
        fill(fresh, a="old")
    die_while_writing(f"with atomic_folder({str(folder)!r}) as fresh:\n    (fresh / 'b').touch()\n    os._exit(9)")
    assert names(folder) == ["a"]
    with atomic_folder(folder) as fresh:
        fill(fresh, c="new")
    assert names(tmp_path) == ["model"]
    assert names(folder) == ["c"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), atomic_folder(tmp_path / "file" / "model"):  # noqa: PT011
        pass
    with pytest.raises(OSError), atomic_path(tmp_path / "file" / "a.txt") as partial:  # noqa: PT011
        partial.touch()
