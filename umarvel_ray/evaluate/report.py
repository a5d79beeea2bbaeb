"""The report of a run: `metrics.json`, `table.md`, TREC run files and a self-contained `index.html`.

write_report(run, dataset, results)      # results in the order of the ladder
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from umarvel_ray.data.dataset import Dataset
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.charts import Line, bar_chart, duration, line_chart, smooth
from umarvel_ray.evaluate.examples import Pictures, examples
from umarvel_ray.evaluate.results import AVERAGE, RERANKED, SCOPES, LadderResult
from umarvel_ray.evaluate.trec import write_run
from umarvel_ray.files import write_json, write_text
from umarvel_ray.recipe import dump_recipe
from umarvel_ray.runs import IN_TRAINING, Run, read_step_log
from umarvel_ray.version import __version__

TASK_SHAPES = {
    "0": "text → image",
    "1": "text → text",
    "2": "text → image + text",
    "3": "image → text",
    "4": "image → image",
    "5": "image → image + text",
    "6": "image + text → text",
    "7": "image + text → image",
    "8": "image + text → image + text",
}


def write_report(run: Run, dataset: Dataset, results: Sequence[LadderResult], name: str = "report") -> Path:
    """Write all files of the report under `run.dir/name` and return the page's path.

    Args:
        results: the ladder, base first, and recall-then-rerank last if there is one. The last single model before it
            provides `run.trec` (local pools), `run-global.trec` and the examples.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = run.dir / name
    final = [result for result in results if result.name != RERANKED][-1]
    try:
        write_json(folder / "metrics.json", metrics(results))
        write_text(folder / "table.md", table(results))
        query_ids = dataset.queries(run.recipe.evaluate.split).table.column("id").combine_chunks()
        for scope, name in (("local", "run.trec"), ("global", "run-global.trec")):
            ranking, tag = final.ranking(scope), f"umarvel-{final.name}"
            write_run(folder / name, ranking, query_ids, dataset.document_ids, tag)
        write_text(folder / "index.html", page(run, dataset, results, final))
    except OSError as error:
        raise UserError(f"cannot write the report to {folder}: {error.strerror}") from None
    print(f"{table(results, scopes=('local',), averages_only=True)}\nreport: {folder / 'index.html'}")
    return folder / "index.html"


def metrics(results: Sequence[LadderResult]) -> dict[str, Any]:
    """The content of `metrics.json`: recall by checkpoint, scope and task, with chance, k and the other metrics."""
    return {
        # "step" holds the checkpoint's name: a published file format, so the key stays.
        "ladder": [{"step": result.name, "local": result.local, "global": result.global_} for result in results],
        "chance": {scope: results[-1].chance(scope) for scope in SCOPES},
        "k": {task: int(numbers["k"]) for task, numbers in results[-1].scores["local"].items()},
        "details": {result.name: {**result.scores, "notes": result.notes} for result in results},
    }


def table(results: Sequence[LadderResult], scopes: Sequence[str] = SCOPES, averages_only: bool = False) -> str:
    """Markdown tables: one row per task, one column per checkpoint, chance next to them."""
    lines = []
    for scope in scopes:
        chance, recalls = results[-1].chance(scope), [_recalls(result, scope) for result in results]
        lines += [f"### {scope.capitalize()} pools", ""] if not averages_only else []
        lines.append(f"| recall, {scope} | k | queries | chance | {' | '.join(result.name for result in results)} |")
        lines.append(f"|---|---:|---:|---:|{'---:|' * len(results)}")
        for task, numbers in results[-1].scores[scope].items():
            if not averages_only:
                cells = [f"{value:.3f}" for value in (chance[task], *(recall[task] for recall in recalls))]
                shown = task.replace("|", "&#124;")
                lines.append(f"| {shown} | {numbers['k']:.0f} | {numbers['queries']:.0f} | {' | '.join(cells)} |")
        bold = "" if averages_only else "**"
        cells = [f"{bold}{recall[AVERAGE]:.3f}{bold}" for recall in recalls]
        queries = sum(numbers["queries"] for numbers in results[-1].scores[scope].values())
        lines += [f"| average | | {queries:.0f} | {chance[AVERAGE]:.3f} | {' | '.join(cells)} |", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def page(run: Run, dataset: Dataset, results: Sequence[LadderResult], final: LadderResult) -> str:
    """The whole report as one HTML file."""
    split, pictures = run.recipe.evaluate.split, Pictures()
    shown = examples(dataset, split, results, final, pictures)
    tasks = list(final.scores["local"])
    recalls = {scope: [_recalls(result, scope) for result in results] for scope in SCOPES}
    environment = Environment(
        loader=PackageLoader("umarvel_ray.evaluate", "."), autoescape=select_autoescape(), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        name=run.recipe.name,
        version=__version__,
        split=split,
        recipe=dump_recipe(run.recipe),
        ladder_names=[result.name for result in results],
        results=results,
        final=final,
        base=results[0],
        scopes=SCOPES,
        average=AVERAGE,
        tasks=tasks,
        shape_of={task: TASK_SHAPES.get(task.rpartition("task")[2], "") for task in tasks},
        recalls=recalls,
        best={scope: {task: max(recall[task] for recall in recalls[scope]) for task in tasks} for scope in SCOPES},
        chance={scope: final.chance(scope) for scope in SCOPES},
        queries=sum(int(numbers["queries"]) for numbers in final.scores["local"].values()),
        documents=len(dataset.global_pool(split)),
        ladder=Markup(_ladder(results, AVERAGE)),
        small={task: Markup(_ladder(results, task, small=True)) for task in tasks},
        curves=_curves(run),
        times=_times(run),
        examples=shown,
        pictures=pictures.uris,
        notes=[(result.name, name, value) for result in results for name, value in result.notes.items()],
    )


def scores_of(run: Run, phase: str) -> dict[str, Any] | None:
    """A phase's recall for its model card: {"k", "chance", "local", "global"} by task; None if it was not evaluated."""
    path = run.dir / "report" / "metrics.json"
    report = json.loads(path.read_text()) if path.is_file() else {"ladder": []}
    for row in report["ladder"]:
        if row["step"] == phase:
            return {"k": report["k"], "chance": report["chance"], "local": row["local"], "global": row["global"]}
    return None


def _recalls(result: LadderResult, scope: str) -> dict[str, float]:
    return result.local if scope == "local" else result.global_


def _ladder(results: Sequence[LadderResult], task: str, small: bool = False) -> str:
    lines = [
        Line(f"{scope} pools", [_recalls(result, scope)[task] for result in results], scope, dots=True)
        for scope in reversed(SCOPES)
    ]
    chance = [result.chance("local")[task] for result in results]
    names = [result.name for result in results]
    title = f"Recall of {task} after each phase"
    if small:
        return line_chart([Line("chance", chance, "chance"), *lines], title, [""] * len(names), 240, 104, 0, 1)
    high = min(1.0, max(max(line.values) for line in lines) * 1.15 + 0.02)
    return line_chart([Line("chance", chance, "chance"), *lines], title, names, 760, 320, 0, high, values=True)


def _curves(run: Run) -> list[dict[str, Any]]:
    """Per phase with a step log: its charts and a summary of time and throughput."""
    curves = []
    logs = sorted((run.dir / "train").glob("*/log.jsonl"), key=lambda path: path.stat().st_mtime)
    for path in logs:
        log = read_step_log(path)
        if not log:
            continue
        losses = [line["loss"] for line in log]
        lines = [Line("loss", losses, "raw"), Line("loss, smoothed", smooth(losses), "smooth")]
        charts = [("loss", Markup(line_chart(lines, f"Loss of {path.parent.name}", (), 360, 170)))]
        temperatures = [line["temperature"] for line in log if line.get("temperature") is not None]
        if temperatures and max(temperatures) > min(temperatures):
            spread = max(temperatures) - min(temperatures)
            low, high = min(temperatures) - 0.1 * spread, max(temperatures) + 0.1 * spread
            line = Line("temperature", temperatures, "smooth")
            title = f"Temperature of {path.parent.name}"
            charts.append(("temperature", Markup(line_chart([line], title, (), 360, 170, low, high))))
        if measured := read_step_log(path.with_name(IN_TRAINING)):
            line = Line("recall", [found["recall"] for found in measured], "smooth", dots=True)
            steps = [str(found["step"] + 1) for found in measured]
            charts.append(
                ("recall, validation", Markup(line_chart([line], f"Recall of {path.parent.name}", steps, 360, 170)))
            )
        seconds = sum(line["seconds"] for line in log)
        waited = sum(line["wait_share"] * line["seconds"] for line in log) / seconds
        rate = sum(line["samples_per_s"] * line["seconds"] for line in log) / seconds
        facts = (
            f"{len(log)} steps · {duration(seconds)} · {rate:.0f} samples/s · {waited:.0%} of the time waiting for data"
        )
        curves.append({"name": path.parent.name, "charts": charts, "facts": facts})
    return curves


def _times(run: Run) -> dict[str, Any] | None:
    path = run.dir / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    if not times:
        return None
    return {"total": duration(sum(times.values())), "chart": Markup(bar_chart(times, "Wall time of each part"))}
