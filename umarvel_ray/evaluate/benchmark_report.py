"""The report over published benchmarks: `benchmarks.md`, `benchmarks.csv` and `index.html`.

First the paper's tables with measured rows below the published ones, then every measured number.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, select_autoescape

from umarvel_ray.data.writing import AVERAGE
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.measured import Measured
from umarvel_ray.evaluate.published import MEASURED, PUBLISHED, Row, Table, published_tables
from umarvel_ray.files import write_text
from umarvel_ray.retrieve.metrics import mean
from umarvel_ray.suites.registry import SUITES
from umarvel_ray.version import __version__

COUNTS = ("queries", "k")  # numbers that are no shares
FIELDS = ("origin", "source", "model", "benchmark", "scope", "task", "metric", "percent")


class Details(NamedTuple):
    """All numbers of one benchmark in one kind of pools: a row for each model and task."""

    title: str
    metrics: list[str]
    rows: list[tuple[str, str, list[str]]]


def write_benchmark_report(folder: Path, results: Sequence[Measured]) -> Path:
    """Write all files of the report and return the page's path.

    Raises:
        UserError: the folder cannot be written.
    """
    results = with_distinct_names(results)
    try:
        write_text(folder / "benchmarks.md", as_markdown(results))
        write_text(folder / "benchmarks.csv", as_csv(results))
        write_text(folder / "index.html", as_page(results))
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}") from None
    return folder / "index.html"


def with_distinct_names(results: Sequence[Measured]) -> list[Measured]:
    """Results of one benchmark under the same name get the beginning of their identity."""
    names = [(result.benchmark, result.model) for result in results]
    return [
        Measured(result.benchmark, f"{result.model} ({result.identity[:8]})", *_rest(result))
        if names.count(name) > 1
        else result
        for name, result in zip(names, results, strict=True)
    ]


def _rest(result: Measured) -> tuple[Any, ...]:
    return result.scores, result.identity, result.notes


def compared(results: Sequence[Measured]) -> list[tuple[Table, list[Row]]]:
    """The paper's tables in which anything was measured, with all their rows."""
    return [(table, rows) for table in published_tables() if (rows := table.beside(results))]


def as_markdown(results: Sequence[Measured]) -> str:
    """The report as Markdown."""
    lines = ["# Benchmarks, in percent", ""]
    for table, rows in compared(results):
        labels = [_cell(column.label) for column in table.columns]
        lines += [f"## {table.title} ({table.source})", ""]
        lines += [f"| model | | {' | '.join(labels)} |", f"|---|---|{'---:|' * len(labels)}"]
        for row in rows:
            bold = "**" if row.origin == MEASURED else ""
            values = [f"{bold}{_percent(value)}{bold}" for value in row.values]
            lines.append(f"| {bold}{_cell(row.model)}{bold} | {row.origin} | {' | '.join(values)} |")
        lines.append("")
    lines += ["## All that was measured", ""]
    for title, metrics, rows in details(results):
        lines += [f"### {title}", "", f"| model | task | {' | '.join(metrics)} |"]
        lines += [f"|---|---|{'---:|' * len(metrics)}"]
        lines += [f"| {_cell(model)} | {_cell(task)} | {' | '.join(values)} |" for model, task, values in rows]
        lines.append("")
    lines += [f"- {_cell(result.model)}, {result.benchmark}: {note}" for result, note in notes(results)]
    return "\n".join(lines).rstrip("\n") + "\n"


def as_csv(results: Sequence[Measured]) -> str:
    """Every number, published or measured, on a line of its own."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(FIELDS)
    for table, rows in compared(results):
        for row in rows:
            if row.origin == PUBLISHED:
                for column, value in zip(table.columns, row.values, strict=True):
                    if value is not None:
                        place = (column.benchmark, column.scope, column.task, column.metric)
                        writer.writerow([PUBLISHED, table.source, row.model, *place, value])
    for result in results:
        for scope, tasks in result.scores.items():
            for task, numbers in tasks.items():
                for metric, value in numbers.items():
                    if metric not in COUNTS:
                        place = (result.benchmark, scope, task, metric)
                        writer.writerow([MEASURED, "", result.model, *place, round(100 * value, 6)])
    return stream.getvalue()


def as_page(results: Sequence[Measured]) -> str:
    """The report as one HTML file."""
    environment = Environment(
        loader=PackageLoader("umarvel_ray.evaluate", "."), autoescape=select_autoescape(), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = _percent
    return environment.get_template("benchmarks.html").render(
        version=__version__,
        tables=compared(results),
        details=details(results),
        notes=[(result.model, result.benchmark, note) for result, note in notes(results)],
        measured=MEASURED,
    )


def details(results: Sequence[Measured]) -> list[Details]:
    """All measured numbers, benchmark by benchmark."""
    found: dict[str, Details] = {}
    for result in results:
        for scope, tasks in result.scores.items():
            suite = SUITES.get(result.benchmark)
            title = suite.title if suite else f"{result.benchmark}, {scope} pools"
            metrics = [*dict.fromkeys(metric for numbers in tasks.values() for metric in numbers)]
            own = found.setdefault(title, Details(title, metrics, []))
            own.rows.extend(
                (result.model, task, [_shown(metric, numbers.get(metric)) for metric in own.metrics])
                for task, numbers in _with_averages(result, scope)
            )
    return list(found.values())


def _with_averages(result: Measured, scope: str) -> Iterator[tuple[str, dict[str, float]]]:
    """The tasks' numbers; of several, also the means over groups of them and over all."""
    tasks = result.scores[scope]
    yield from tasks.items()
    if len(tasks) == 1:
        return
    suite = SUITES.get(result.benchmark)
    for name, members in ({**suite.groups} if suite else {}).items():
        own = [tasks[task] for task in members if task in tasks]
        if own:
            yield name, _mean(own)
    yield AVERAGE, _mean(list(tasks.values()))


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    shares = {metric: mean([row[metric] for row in rows]) for metric in rows[0] if metric not in COUNTS}
    return shares | {"queries": sum(row["queries"] for row in rows)}


def notes(results: Sequence[Measured]) -> Iterator[tuple[Measured, str]]:
    """How each result was measured, as far as it departs from the defaults."""
    for result in results:
        if result.notes:
            yield result, ", ".join(f"{name} {_plain(value)}" for name, value in result.notes.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return str(next(iter(set(value.values())))) if len(set(value.values())) == 1 else str(value)
    return str(value)


def _shown(metric: str, value: float | None) -> str:
    return _percent(None if value is None else 100 * value) if metric not in COUNTS else f"{value or 0:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _cell(text: str) -> str:
    return text.replace("|", "&#124;")
