"""The report over published benchmarks: Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io

import pytest

from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.benchmark_report import as_csv, as_markdown, as_page, details, write_benchmark_report
from umarvel_ray.evaluate.measured import Measured, read_measured

NUMBERS = {"mAP@5": 0.3, "mAP@10": 0.35, "mAP@25": 0.4, "mAP@50": 0.5, "queries": 220}


def circo(model: str = "mine", identity: str = "a" * 64, **notes) -> Measured:
    return Measured("circo", model, {"local": {"circo": NUMBERS}}, identity, notes)


def genecis() -> Measured:
    tasks = {f"t{n}": {"R@1": n / 10, "R@2": 0.5, "R@3": 0.6, "queries": n} for n in range(1, 5)}
    return Measured("genecis", "mine", {"local": tasks}, "b" * 64)


def test_markdown_marks_published_rows():
    lines = as_markdown([circo(protocol="reference")]).splitlines()
    assert any("| U-MARVEL Qwen2-VL-7B | published |" in line and "| 36.2 |" in line for line in lines)
    [own] = [line for line in lines if line.startswith("| **mine** | measured |")]
    assert "| **30.0** |" in own
    assert "| mine | circo | 30.0 | 35.0 | 40.0 | 50.0 | 220 |" in lines
    assert "- mine, circo: protocol reference" in lines


def test_csv_has_a_line_for_each_number():
    rows = list(csv.DictReader(io.StringIO(as_csv([circo()]))))
    measured = [row for row in rows if row["origin"] == "measured"]
    assert [(row["metric"], row["percent"]) for row in measured] == [
        ("mAP@5", "30.0"), ("mAP@10", "35.0"), ("mAP@25", "40.0"), ("mAP@50", "50.0")
    ]  # fmt: skip
    published = [row for row in rows if row["origin"] == "published"]
    assert {row["source"] for row in published} == {"Table 9 of arXiv 2507.14902"}
    assert len(published) == 12 * 12 - 2 * 5  # two models have no numbers for five sets


def test_html_marks_published_rows_and_escapes_names():
    page = as_page([circo("<b>mine</b>")])
    assert '<tr class="published"><td class="name">U-MARVEL Qwen2-VL-7B</td><td class="name">published</td>' in page
    assert "&lt;b&gt;mine&lt;/b&gt;</td><td" in page
    assert "<b>mine</b>" not in page
    assert "http" not in page.split("<main>")[1]


def test_several_tasks_are_averaged_and_mmeb_by_group_too():
    [part] = details([genecis()])
    assert part.rows[-1] == ("mine", "average", ["25.0", "50.0", "60.0", "10"])
    scores = {name: {"accuracy": value, "queries": 1} for name, value in (("VOC2007", 1.0), ("GQA", 0.0))}
    [part] = details([Measured("mmeb", "mine", {"local": scores}, "c" * 64)])
    assert [(task, values[0]) for _, task, values in part.rows] == [
        ("VOC2007", "100.0"), ("GQA", "0.0"), ("Classification", "100.0"), ("VQA", "0.0"), ("in-domain", "100.0"),
        ("out-of-domain", "0.0"), ("average", "50.0"),
    ]  # fmt: skip


def test_models_of_one_name_are_told_apart(tmp_path):
    for n, identity in enumerate(("a" * 64, "d" * 64)):
        circo(identity=identity).save(tmp_path / str(n))
    write_benchmark_report(tmp_path / "report", read_measured(tmp_path))
    text = (tmp_path / "report/benchmarks.md").read_text()
    assert "| mine (aaaaaaaa) | circo |" in text
    assert "| mine (dddddddd) | circo |" in text


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "report").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        write_benchmark_report(tmp_path / "report", [circo()])
