"""One of the paper's ablations (Tables 1 to 6) on any recipe: every row starts from the same checkpoints.

python -m experiments.ablate demo --table 5 [key=value …] [--rows key=value …] [--seeds 3] [--publish]
ray job submit --working-dir . -- python -m experiments.ablate qwen2vl-7b --table 5 output=/shared/runs/qwen2vl-7b

Writes RUN/ablations/table-N.json and .md after every row; the same command resumes an interrupted table. `--publish`
copies the JSON to benchmarks/results/ablations and prints the Markdown, which docs/ablations.md contains.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from experiments.ablation.tables import NUMBERS, Row, paper_table
from umarvel_ray.cli import Parser, guard, open_run
from umarvel_ray.errors import UserError
from umarvel_ray.files import write_json, write_text
from umarvel_ray.recipe import Recipe, load_recipe

PUBLISHED = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "ablations"


def main() -> None:
    parser = Parser(prog="python -m experiments.ablate", description="Run one of the paper's ablations on a recipe.")
    parser.add_argument("recipe", nargs="?", default="demo", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, for all checkpoints")
    parser.add_argument("--table", type=int, choices=NUMBERS, required=True)
    parser.add_argument("--rows", nargs="+", default=[], metavar="key=value", help="changes to the rows only")
    parser.add_argument("--seeds", type=int, default=1, help="how many, of every row (default 1)")
    parser.add_argument("--publish", action="store_true", help="copy the table's record to benchmarks/results; no run")
    parser.add_argument("--verbose", action="store_true", help="show the output of the workers")

    def job() -> None:
        options = parser.parse_intermixed_args()
        (publish if options.publish else run)(options)

    sys.exit(guard(job))


def run(options: argparse.Namespace) -> None:
    """Make the shared checkpoints, then run every row with each of the seeds."""
    recipe = load_recipe(options.recipe, options.overrides)
    changes = [*options.overrides, *options.rows]
    table = paper_table(options.table, load_recipe(options.recipe, changes))

    def variant(row: Row, seed: int, folder: Path) -> Recipe:
        return load_recipe(options.recipe, [*changes, *(row.changes or ()), f"seed={seed}", f"output={folder}"])

    with open_run(recipe, verbose=options.verbose) as shared:
        from experiments.ablation import trials
        from experiments.ablation.record import make_record
        from umarvel_ray.pipeline import open_actors

        data = trials.evaluation_data(shared)
        outcomes: dict[str, dict[int, trials.Outcome]] = {row.label: {} for row in table.rows}
        facts: dict[str, Any] = {
            "recipe": recipe.name,
            "row_changes": options.rows,
            "seed": recipe.seed,
            "queries": data.queries(recipe.evaluate.split).n,
        }

        def keep(label: str, seed: int, outcome: trials.Outcome) -> None:
            outcomes[label][seed] = outcome
            write(shared.dir / "ablations" / f"table-{table.number}", make_record(table, outcomes, facts))

        with open_actors(shared) as actors:
            facts["shared_seed"] = trials.build_shared(shared, table, actors)
            for seed in range(recipe.seed, recipe.seed + options.seeds):
                opened = trials.open_trials(shared, table, variant, seed)
                trials.train(shared, table, opened, actors)
                for row in table.rows:
                    if row.changes is None:
                        keep(row.label, seed, trials.measure_checkpoint(shared, table.shared_phase, data, actors))
                for trial in opened:
                    keep(trial.row.label, seed, trials.measure(trial, table, data, actors))


def write(path: Path, record: dict[str, Any]) -> None:
    """The table in both forms."""
    from experiments.ablation.record import markdown

    write_json(path.with_suffix(".json"), record)
    write_text(path.with_suffix(".md"), markdown(record))


def publish(options: argparse.Namespace) -> None:
    """Copy a table's record to the published ones and print what docs/ablations.md needs.

    Raises:
        UserError: the table has not been run.
    """
    from experiments.ablation.record import count_verdicts, markdown

    file = load_recipe(options.recipe, options.overrides).run_dir / "ablations" / f"table-{options.table}.json"
    if not file.exists():
        raise UserError(f"{file} does not exist; run this table first (the same command without --publish)")
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    (PUBLISHED / file.name).write_text(file.read_text())
    records = [json.loads(path.read_text()) for path in sorted(PUBLISHED.glob("table-*.json"))]
    print(markdown(json.loads(file.read_text())))
    print(f"verdicts over tables {[record['table'] for record in records]}: {dict(count_verdicts(records))}")


if __name__ == "__main__":
    main()
