"""The report's files on the demo data: the documented format, every number, safe HTML, self-contained and small."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from markupsafe import escape

from tests.support.random_result import random_result
from tests.support.small_dataset import make_dataset
from umarvel_ray.data.dataset import Queries
from umarvel_ray.data.stored import write_stored
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.evaluate.report import page as page_of
from umarvel_ray.evaluate.report import table, write_report
from umarvel_ray.evaluate.results import SCOPES
from umarvel_ray.recipe import Data, load_recipe
from umarvel_ray.runs import Run

LADDER = ["base", "text", "image-text", "instruction", "hard-negatives", "distillation", "recall+rerank"]


def make_run(folder) -> Run:
    """A run folder with step logs and times."""
    run = Run.open(load_recipe("demo", [f"output={folder}"]))
    rng = np.random.default_rng(0)
    for phase in ("text", "image-text", "instruction", "hard-negatives", "reranker", "distillation"):
        log = run.dir / "train" / phase / "log.jsonl"
        log.parent.mkdir(parents=True)
        lines = [
            {"step": i, "loss": 4.0 * np.exp(-i / 25) + 0.3 * rng.random(), "grad_norm": 1.0, "seconds": 0.8,
             "temperature": None if phase == "reranker" else 0.05 - 0.0002 * i * (phase == "instruction"),
             "wait_share": 0.1, "samples_per_s": 160.0, "tokens_per_s": 4000.0}
            for i in range(80)
        ]  # fmt: skip
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = {"stage1": 210.0, "mining": 40.0, "stage2": 95.0, "reranker": 80.0, "teacher": 30.0, "stage3": 60.0,
             "evaluation": 130.0}  # fmt: skip
    (run.dir / "times.json").write_text(json.dumps(times))
    return run


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(load_recipe("demo").data)


@pytest.fixture(scope="module")
def written(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = make_run(folder / "run")
    results = [random_result(dataset, run.recipe, name, 0.1 + 0.1 * i, folder / name) for i, name in enumerate(LADDER)]
    return run, results, write_report(run, dataset, results).read_text()


class Tags(HTMLParser):
    """Checks that tags close in order, and collects attributes."""

    VOID = frozenset({"meta", "br", "path", "circle", "rect", "polyline"})

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.wrong = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append((tag, self.getpos()))


def test_metrics_have_the_documented_format(written):
    run, results, _ = written
    found = json.loads((run.dir / "report" / "metrics.json").read_text())
    assert [row["step"] for row in found["ladder"]] == LADDER
    for row, result in zip(found["ladder"], results, strict=True):
        for scope in SCOPES:
            tasks = {task: numbers["recall"] for task, numbers in result.scores[scope].items()}
            assert row[scope] == {**tasks, "average": pytest.approx(sum(tasks.values()) / 12)}
    assert found["k"]["clipart_task0"] == 10
    assert found["k"]["emoji_task0"] == 5
    assert 0 < found["chance"]["global"]["average"] < found["chance"]["local"]["average"] < 0.05


def test_run_file_holds_the_single_model_rankings(written, dataset):
    run, results, _ = written
    found: dict[str, list[str]] = {}
    for line in (run.dir / "report" / "run.trec").read_text().splitlines():
        query, _, document, *_ = line.split()
        found.setdefault(query, []).append(document)
    ids, query_ids = dataset.document_ids, dataset.queries("test").table.column("id")
    assert found == {
        query_ids[row["query"]].as_py(): ids.take(row["documents"]).to_pylist()
        for row in results[-2].ranking("local").to_pylist()
    }


def test_table_has_chance_next_to_every_number(written, dataset):
    _, results, _ = written
    lines = table(results).splitlines()
    row = next(line for line in lines if line.startswith("| flags_task4"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    queries = len(dataset.queries("test").of_task("flags_task4"))
    assert cells[:3] == ["flags_task4", "5", str(queries)]
    assert float(cells[3]) == pytest.approx(results[0].chance("local")["flags_task4"], abs=6e-4)
    assert [float(cell) for cell in cells[4:]] == pytest.approx([r.local["flags_task4"] for r in results], abs=6e-4)


def test_page_is_well_formed_self_contained_and_small(written):
    run, _, page = written
    assert (run.dir / "report" / "index.html").stat().st_size < 5_000_000
    tags = Tags()
    tags.feed(page)
    assert tags.wrong == []
    assert tags.open == []
    links = [value for name, value in tags.attributes if name in ("src", "href")]
    assert links == []
    assert not re.search(r"url\((?!data:image/)", page)
    assert "@import" not in page


def test_page_shows_every_task_checkpoint_and_number(written, dataset):
    _, results, page = written
    for result in results:
        for task in dataset.tasks("test"):
            assert task in page
            assert f"{result.local[task]:.3f}" in page
            assert f"{result.global_[task]:.3f}" in page
    assert page.count('<div class="example">') == 3 * 12
    for story in ("Found after training", "Found all along", "Still missed"):
        assert page.count(f'<div class="why">{story}</div>') == 12
    defined = {int(n) for n in re.findall(r"^\.p(\d+)\{", page, re.M)}
    assert {int(n) for n in re.findall(r'class="pic p(\d+)"', page)} == defined


@pytest.mark.parametrize("name", ["flickr30k.v1_task0", "7", "0.5", "a|b, <c> {d} %s", "Straße № 1/2", "items", "test"])
def test_a_task_may_have_any_name_that_the_data_may(name, tmp_path):
    make_dataset(tmp_path / "data")
    for table_name in ("pools", "train", "validation", "test"):
        path = tmp_path / "data" / f"{table_name}.parquet"
        rows = pq.read_table(path).to_pylist()
        renamed = [row | {"task": name if row["task"] == "words_task1" else row["task"]} for row in rows]
        pq.write_table(pa.Table.from_pylist(renamed), path)
    dataset = open_dataset(Data(root=str(tmp_path / "data")), tmp_path / "tables")
    dataset.validate("test")
    run = make_run(tmp_path / "run")
    results = [random_result(dataset, run.recipe, step, 0.5, tmp_path / step) for step in ("base", "instruction")]
    page = write_report(run, dataset, results).read_text(encoding="utf-8")
    assert str(escape(name)) in page
    assert table(results).count("\n| ") == 8  # two tasks, their average and a head for each scope


def test_texts_cannot_become_markup(written, dataset, tmp_path):
    run, results, _ = written
    hostile = '<script>alert(1)</script>"><img src=x>'
    queries = dataset.queries("test")
    rows, texts = queries.table.fetch(queries.rows), pa.array([hostile] * queries.n)
    rows = rows.set_column(rows.schema.get_field_index("text"), "text", texts)
    table = write_stored(tmp_path / "poisoned.arrow", rows.schema, rows.to_batches())
    poisoned = dataset.with_queries("test", Queries.of(table))
    page = page_of(run, poisoned, results, results[-2])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
