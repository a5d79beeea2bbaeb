"""Result files, Markdown tables and the scripts' arguments."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.machine import describe_machine
from benchmarks.common.timing import Times, median_ratio

RESULTS = Path(__file__).resolve().parents[1] / "results"


def write_result(name: str, figures: Mapping[str, Any], path: Path | None = None) -> None:
    """Write `results/NAME.json`, or `path`, with a description of the machine."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": describe_machine(), **figures}, indent=1) + "\n")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Markdown; the first column is text, the others are numbers."""
    print("\n| " + " | ".join(header) + " |\n|---|" + "---:|" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def report_comparison(
    name: str,
    setting: str,
    work: Mapping[str, int],
    times: Times,
    targets: Mapping[str, float],
    differences: Mapping[str, float],
    **extra: Any,
) -> None:
    """Print a comparison and write `results/NAME.json`.

    Args:
        setting: what was measured, in words.
        work: what every side does in one round, by unit. Rates are those of each side's best round.
        times: what `alternate` returns, ours first.
        targets: the speedup we aim for over a side.
        differences: the largest difference between the sides' outputs, by name.
        extra: more entries of the result file.
    """
    ours = next(iter(times.values()))
    rates = {side: {unit: count / min(t["seconds"]) for unit, count in work.items()} for side, t in times.items()}
    speedup = {side: {clock: median_ratio(t[clock], ours[clock]) for clock in t} for side, t in times.items()}
    figures = {"setting": setting, "work": work, "times": times, "rates": rates, "speedup": speedup,
               "targets": targets, "differences": differences, **extra}  # fmt: skip
    write_result(name, figures)
    print(f"\n{setting}\n{describe_machine()}")
    print_table(
        (name, *(f"{unit}/s" for unit in work), "speedup of ours", "by CPU time", "target"),
        [
            (
                side,
                *(f"{rate:.1f}" for rate in rates[side].values()),
                *(f"{ratio:.2f}×" for ratio in speedup[side].values()),
                f"{targets[side]:.1f}×" if side in targets else "",
            )
            for side in times
        ],
    )
    for what, difference in differences.items():
        print(f"largest difference, {what}: {difference:.1e}")


def integer_arguments(words: Sequence[str]) -> dict[str, int]:
    """`items=64 rounds=1` as keyword arguments."""
    return {name: int(value) for name, value in text_arguments(words).items()}


def text_arguments(words: Sequence[str]) -> dict[str, str]:
    """`recipe=demo phase=text` as keyword arguments."""
    return dict(word.split("=", 1) for word in words)
