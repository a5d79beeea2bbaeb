"""A table's results as a JSON record, and as a Markdown table with the paper's numbers beside ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from experiments.ablation.tables import Table
from experiments.ablation.trials import Hits, Outcome
from umarvel_ray.evaluate.bootstrap import Interval, paired_interval
from umarvel_ray.evaluate.results import SCOPES

Outcomes = Mapping[str, Mapping[int, Outcome]]  # row label → seed → score


def make_record(table: Table, outcomes: Outcomes, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a table so far; rows without an outcome have no seeds.

    Recall is a fraction, as in a run's report; the paper's numbers are in percent. Differences are to the reference
    row, over the seeds that both have: each query's hits are averaged over them before the bootstrap.

    Args:
        facts: more entries: recipe, its changes, seeds, number of queries.
    """
    return {
        "table": table.number,
        "reference": table.reference,
        **facts,
        "complete": all(outcomes.get(row.label) for row in table.rows),
        "rows": [
            {
                "label": row.label,
                "changes": row.changes,
                "paper": dict(zip(SCOPES, row.paper, strict=True)),
                "claim": row.claim,
                "seeds": {str(seed): outcome.average for seed, outcome in outcomes.get(row.label, {}).items()},
                "failed": next((o.failure for o in outcomes.get(row.label, {}).values() if o.failure), None),
                "difference": differences(outcomes, row.label, table.reference),
            }
            for row in table.rows
        ],
    }


def differences(outcomes: Outcomes, label: str, reference: str) -> dict[str, Interval] | None:
    """Row minus reference by scope; None for the reference itself, and where either has no score."""
    ours, theirs = (_scored(outcomes.get(name, {})) for name in (label, reference))
    seeds = ours.keys() & theirs.keys()
    if label == reference or not seeds:
        return None
    return {
        scope: paired_interval(*(_mean_hits([side[seed] for seed in seeds], scope) for side in (ours, theirs)))
        for scope in SCOPES
    }


def markdown(record: Mapping[str, Any]) -> str:
    """The rows as a bare table; recall in percent."""
    lines = [
        "| | paper, local | paper, global | ours, local | ours, global | Δ local | Δ global | claim |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in record["rows"]:
        paper = [_percent(row["paper"][scope]) for scope in SCOPES]
        averages = [average for average in row["seeds"].values() if average]
        if row["changes"] is None:
            averages = averages[:1]  # the same checkpoint for every seed
        ours = [_spread([average[scope] for average in averages]) for scope in SCOPES]
        if row["failed"]:
            ours = ["failed", "failed"]
        difference = [_interval(row["difference"] and row["difference"][scope]) for scope in SCOPES]
        lines.append("| " + " | ".join([row["label"], *paper, *ours, *difference, verdict(row)]) + " |")
    return "\n".join(lines) + "\n"


def verdict(row: Mapping[str, Any]) -> str:
    """Whether our local difference supports the paper's claim on a row; empty where the paper makes none."""
    if row["claim"] is None:
        return ""
    if row["failed"]:
        return "agrees" if row["claim"] == "lower" else "disagrees"
    if not row["difference"]:
        return "not run"
    ours = Interval(*row["difference"]["local"])
    if ours.holds_zero:
        return "inconclusive"
    return "agrees" if (ours.mean > 0) == (row["claim"] == "higher") else "disagrees"


def count_verdicts(records: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """How many rows got each verdict."""
    return Counter(verdict(row) for record in records for row in record["rows"] if row["claim"])


def _scored(by_seed: Mapping[int, Outcome]) -> dict[int, Hits]:
    return {seed: outcome.hits for seed, outcome in by_seed.items() if outcome.hits}


def _mean_hits(hits: list[Hits], scope: str) -> dict[str, np.ndarray]:
    return {task: np.mean([one[scope][task] for one in hits], axis=0) for task in hits[0][scope]}


def _percent(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.1f}"


def _spread(values: list[float]) -> str:
    """Mean over seeds, with the standard deviation if there are several."""
    if not values:
        return "–"
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def _interval(value: tuple[float, float, float] | None) -> str:
    if not value:
        return "–"
    middle, low, high = (100 * number for number in value)
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
