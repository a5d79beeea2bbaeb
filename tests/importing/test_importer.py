"""The whole of `umarvel import`: what it prints and writes, in bounded memory, and nothing if it is interrupted."""

from __future__ import annotations

import io
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import REPO
from tests.importing.sources import CAPTIONS, N, found, rows, write_csv, write_jsonl, write_pictures, write_tar
from umarvel_ray.cli import _recipe_words, main
from umarvel_ray.data.plan import contrastive_plan
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.importing import importer
from umarvel_ray.importing.importer import import_dataset
from umarvel_ray.importing.recipe_file import Size, batch_of
from umarvel_ray.importing.tasks import DEFAULTS
from umarvel_ray.preflight import check_job
from umarvel_ray.recipe import load_recipe
from umarvel_ray.runs import Run


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "in"
    lines = zip(write_pictures(folder), CAPTIONS, strict=True)
    write_csv(folder / "captions.csv", [("file", "caption"), *lines, ("gone.png", "a")])
    return folder


def test_what_is_printed(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["import", "in", "--to", "data/mine", "--holdout", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "kind: captions (picture from 'file', caption from 'caption')",
        "rows: 13 read, 12 kept, 1 set aside",
        "  1 × picture not found",
    ]
    assert lines[4] == "documents: 12 text, 12 image"
    counts = {"train": 0, "validation": 0, "test": 0}
    for line, words in zip(lines[5:7], ("mine_task0 (text → image: ", "mine_task3 (image → text: "), strict=True):
        assert words in line
        for count, split in re.findall(r"(\d+) (\w+)", line.rpartition(":")[2]):
            counts[split] += int(count)
    assert counts == {split: len(rows(tmp_path / "data" / "mine", split)) for split in counts}
    assert lines[7] == "rows to look at:"
    shown = [re.fullmatch(r"  (train|validation|test) +“(.*)” → \[(\d+)\.png\]", line) for line in lines[8:18]]
    assert all(CAPTIONS[int(match[3])] == match[2] for match in shown)
    assert len({match[3] for match in shown}) == 10
    assert lines[18] == "next:"
    recipe, search, on_gpu = (shlex.split(line, comments=True) for line in lines[19:])
    assert recipe == ["umarvel", "train", "data/mine/recipe.yaml"]
    assert search[:2] == ["umarvel", "search"]
    large = load_recipe(on_gpu[2], on_gpu[3:])
    assert (large.data.root, large.data.format, large.stage1.text, large.cluster.workers) == (
        "data/mine",
        "parquet",
        None,
        1,
    )
    small = load_recipe(recipe[2])
    assert (small.name, small.base, small.data.root) == ("mine", "builtin:demo", str(tmp_path / "data" / "mine"))
    assert list(small.phases()) == ["instruction", "hard-negatives", "reranker", "distillation"]
    assert all(phase.queries == "train" for phase in small.phases().values())


@pytest.mark.parametrize("name", ["my #1: data", "123", "null", "it's {x}, [y]", "日本", "a=b", "$HOME `id`"])
def test_the_printed_commands_can_be_pasted(name, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import_dataset(source, Path(name))
    for line in capsys.readouterr().out.split("next:\n")[1].splitlines():
        echo = ["bash", "-c", f"printf '%s\\0' {line}"]
        words = subprocess.run(echo, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
        assert words[0] == "umarvel"
        if words[1] == "train":
            recipe = load_recipe(*_recipe_words(words[2:]))
            assert Path(recipe.data.root).absolute() == (tmp_path / name).absolute()


@pytest.mark.parametrize(
    ("queries", "distinct", "batch"), [(4, 4, 2), (18, 18, 4), (100, 90, 16), (100, 10, 4), (10_000, 9_000, 128)]
)
def test_a_batch_is_at_most_half_of_the_positives_and_a_quarter_of_the_queries(queries, distinct, batch):
    assert batch_of(Size(queries, distinct, 10), 128) == batch


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 12), min_size=3, max_size=40), st.booleans())
@example([12, 1, 12, 1, 12, 12, 1, 12, *[1] * 6, 12, 1, 12, 1, 1, 1], True)  # many captions, of few pictures
def test_the_written_recipe_can_fill_its_batches_or_the_import_says_why(tmp_path_factory, captions, same):
    """Pictures with some captions each: all of their own, or the same everywhere."""
    folder = tmp_path_factory.mktemp("few")
    names = write_pictures(folder / "in", len(captions))
    lines = [
        {"file": name, "captions": [f"{'it' if same and n > 2 else n} as {k}" for k in range(count)]}
        for n, (name, count) in enumerate(zip(names, captions, strict=True))
    ]
    write_jsonl(folder / "in" / "a.jsonl", lines)
    reason = None
    try:
        import_dataset(folder / "in", folder / "out")
    except UserError as error:
        reason = str(error)
    assert (folder / "out").exists() == (reason is None)
    if reason is not None:
        assert "with other content" in reason
        return
    recipe = load_recipe(str(folder / "out" / "recipe.yaml"))
    dataset = open_dataset(recipe.data, folder / "tables")
    for phase in (recipe.stage1.instruction, recipe.stage2.train):
        for homogeneous in (phase.homogeneous, 1.0):
            changed = phase.model_copy(update={"homogeneous": homogeneous})
            plan = contrastive_plan(dataset.queries("train"), changed, recipe.seed, dataset.content())
            assert len(plan) == phase.max_steps


@pytest.mark.parametrize(("pictures", "kept"), [(6, 1.0), (20, 1.0), (300, "calibrate")])
def test_the_commands_that_are_printed_have_what_they_need_of_few_pictures_too(
    tmp_path, capsys, monkeypatch, pictures, kept
):
    """Thresholds are calibrated where there are queries to do it on."""
    monkeypatch.chdir(tmp_path)
    names = write_pictures(tmp_path / "in", pictures)
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"file": name, "caption": f"thing {name}"} for name in names])
    import_dataset(tmp_path / "in", tmp_path / "out")
    commands = [line.partition("     #")[0] for line in capsys.readouterr().out.splitlines() if "umarvel train" in line]
    assert len(commands) == 2
    for number, command in enumerate(commands):
        source, changes = _recipe_words(shlex.split(command)[2:])
        recipe = load_recipe(source, [*changes, f"output={tmp_path / str(number)}", "base=builtin:demo"])
        check_job(Run.open(recipe), "pipeline")
        assert recipe.stage2.mining.max_similarity == (kept if number == 0 or kept == 1.0 else 0.7)


@pytest.mark.parametrize(
    ("given", "first", "second"),
    [
        ([], DEFAULTS[0], DEFAULTS[3]),
        (["Find it."], "Find it.", "Find it."),
        (["task3=Say it.", "Find it."], "Find it.", "Say it."),
        (["task0=A photo of a=b."], "A photo of a=b.", DEFAULTS[3]),
        (["task0="], None, DEFAULTS[3]),
    ],
)
def test_instructions(given, first, second, source, tmp_path):
    import_dataset(source, tmp_path / "out", instructions=given)
    said = {(row["task"][-1], row["instruction"]) for row in rows(tmp_path / "out", "train")}
    assert said == {("0", first), ("3", second)}


def test_importing_loads_neither_torch_nor_ray(source, tmp_path):
    code = (
        f"import sys; from umarvel_ray.cli import main; assert main(['import', {str(source)!r}, '--to', "
        f"{str(tmp_path / 'out')!r}]) == 0; assert not {{'torch', 'ray', 'transformers'}} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0


@pytest.mark.parametrize("moment", ["split_queries", "write_tables", "write_recipe"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_a_failure_at_any_moment_leaves_nothing(moment, error, source, tmp_path, monkeypatch):
    def fail(*_) -> None:
        raise error

    monkeypatch.setattr(importer, moment, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else error):
        import_dataset(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    monkeypatch.undo()
    import_dataset(source, tmp_path / "out")
    assert len(found(tmp_path / "out")) == 2 * N


def test_a_process_that_is_killed_leaves_no_folder_and_the_next_succeeds(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ({"query": f"q{n}", "pos": [f"p{n}"]} for n in range(200_000)))
    command = [sys.executable, "-m", "umarvel_ray.cli", "import", str(file), "--to", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (started := list(tmp_path.glob(".out.writing/*"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert started
    assert not (tmp_path / "out").exists()
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:100]))
    assert subprocess.run(command, cwd=REPO, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert len(found(tmp_path / "out")) == 100


MEASURED = """
import sys
from pathlib import Path
from umarvel_ray.cli import _recipe_words, main
assert main(["import", *sys.argv[1:]]) == 0
status = Path("/proc/self/status").read_text().splitlines()
print("peak", next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("kind", ["captions", "webdataset", "parquet"])
def test_three_hundred_megabytes_of_pictures_are_never_in_memory_together(kind, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)

    def picture(number: int) -> bytes:
        noise[0, 0] = number
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
        return buffer.getvalue()

    if kind == "captions":
        for number in range(100):
            (folder / f"{number}.png").write_bytes(picture(number))
        write_csv(folder / "a.csv", [("file", "caption"), *((f"{n}.png", f"noise {n}") for n in range(100))])
    elif kind == "webdataset":
        parts = ((f"{n}.{part}", content) for n in range(100)
                 for part, content in (("png", picture(n)), ("txt", f"noise {n}".encode())))  # fmt: skip
        write_tar(folder / "a.tar", parts)
    else:
        schema = pa.schema(
            [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("text", pa.string())]
        )
        with pq.ParquetWriter(folder / "a.parquet", schema, compression="none") as writer:
            for start in range(0, 100, 5):  # row groups of 15 MB
                values = [{"image": {"bytes": picture(n)}, "text": f"noise {n}"} for n in range(start, start + 5)]
                writer.write_table(pa.Table.from_pylist(values, schema))
    assert sum(file.stat().st_size for file in folder.iterdir()) > 300e6
    command = [sys.executable, "-c", MEASURED, str(folder), "--to", str(tmp_path / "out"), "--holdout", "0.1"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert pq.ParquetFile(tmp_path / "out" / "documents.parquet").metadata.num_rows == 200
    peak = int(done.stdout.split()[-1])
    print(f"peak of {kind}: {peak} MiB")
    assert peak < 320, f"{peak} MiB"
