"""The paper's tables: what the file holds, and measured rows beside published ones."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPO
from umarvel_ray.evaluate.measured import Measured
from umarvel_ray.evaluate.published import MEASURED, PUBLISHED, published_tables
from umarvel_ray.suites.galleries import GENECIS_TASKS, SUGARCREPE_TASKS
from umarvel_ray.suites.registry import MBEIR, SUITES

TASKS = {"genecis": GENECIS_TASKS, "sugarcrepe": SUGARCREPE_TASKS}


def result(benchmark: str, tasks: dict[str, float], metric: str, model: str = "mine", scope: str = "local") -> Measured:
    return Measured(benchmark, model, {scope: {task: {metric: value} for task, value in tasks.items()}}, "0" * 64)


def method_tables() -> list[list[list[str]]]:
    """The tables of docs/method.md's published results."""
    text = (REPO / "docs/method.md").read_text()
    part = text[text.index('id="published-mbeir"') : text.index('id="published-ablations"')]
    tables, current = [], []
    for line in [*part.splitlines(), ""]:
        if line.startswith("|"):
            current.append([cell.strip(" *") for cell in line.strip("|").split("|")])
        elif current:
            tables.append([current[0], *current[2:]])
            current = []
    return tables


def numbers(cell: str) -> list[float]:
    return [float(value) for value in re.findall(r"\d+\.\d", cell)]


def test_the_documents_quote_the_same_numbers():
    """docs/method.md shows the rows of U-MARVEL and LamRA, tables 7 and 8 transposed and together."""
    local, global_, images, videos = published_tables()
    mbeir, zero_shot, video = method_tables()
    for at, model in enumerate(mbeir[0][1:], 1):
        quoted = [numbers(row[at]) for row in mbeir[1:]]
        assert [pair[0] for pair in quoted] == list(local.rows[model])
        assert [pair[1] for pair in quoted] == list(global_.rows[model])
    for at, model in enumerate(zero_shot[0][1:], 1):
        assert [float(row[at]) for row in zero_shot[1:]] == list(images.rows[model])
    for model, *cells in video[1:]:
        assert [value for cell in cells for value in numbers(cell)] == list(videos.rows[model])


def test_published_averages_are_the_means_of_their_tasks():
    """As printed, to a tenth: the paper rounds one of them up."""
    for table in published_tables()[:2]:
        for values in table.rows.values():
            assert sum(values[:-1]) / 16 == pytest.approx(values[-1], abs=0.08)


def test_columns_are_what_the_benchmarks_measure():
    for table in published_tables():
        assert all(len(values) == len(table.columns) for values in table.rows.values())
        for column in table.columns:
            if column.benchmark != MBEIR:
                assert column.metric in SUITES[column.benchmark].metrics


def test_a_measured_row_stands_below_the_published_ones():
    table = published_tables()[2]
    rows = table.beside([result("circo", {"circo": 0.25}, "mAP@5"), result("visdial", {"visdial": 0.5}, "R@1")])
    assert [row.origin for row in rows] == [PUBLISHED] * 12 + [MEASURED]
    shown = dict(zip((column.label for column in table.columns), rows[-1].values, strict=True))
    assert {label: value for label, value in shown.items() if value is not None} == {
        "CIRCO mAP@5": 25.0,
        "VisDial R@1": 50.0,
    }
    assert rows[8].model == "U-MARVEL Qwen2-VL-7B"
    assert rows[8].values[6] == 36.2
    assert published_tables()[3].beside([result("circo", {"circo": 0.25}, "mAP@5")]) == []


def test_an_average_is_over_all_tasks():
    table = published_tables()[2]
    at = next(n for n, column in enumerate(table.columns) if column.benchmark == "genecis")
    values = dict(zip(GENECIS_TASKS, (0.1, 0.2, 0.3, 0.4), strict=True))
    assert table.beside([result("genecis", values, "R@1")])[-1].values[at] == pytest.approx(25.0)


def test_an_average_over_some_of_mbeirs_tasks_is_not_compared():
    table = published_tables()[0]
    tasks = {column.task: 0.5 for column in table.columns[:-1]}
    assert table.beside([result(MBEIR, tasks, "recall")])[-1].values[-1] == 50.0
    some = dict(list(tasks.items())[:3])
    values = table.beside([result(MBEIR, some, "recall")])[-1].values
    assert values[:3] == (50.0, 50.0, 50.0)
    assert values[-1] is None
    assert published_tables()[1].beside([result(MBEIR, tasks, "recall")]) == []
