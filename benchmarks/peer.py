"""The peer of the demo's ladder: frozen EfficientNet-Lite0 and MiniLM with trained linear heads into one space.

The heads (common/linear_peer.py) train on the demo's train split, are tuned on validation (`--search`) and measured on
test with the demo's own protocol: Recall@5, @10 for clip-art, the query's own picture out of the pool. The peer is told
each query's task, where the demo's model has to follow the instruction.

    pip install --no-deps -r requirements-bench.lock
    python -m benchmarks.peer            # three seeds → benchmarks/results/peer.json; prints the table, beside the
                                         # ladder in runs/demo if the demo has run
    python -m benchmarks.peer --search   # validation recall of settings around the chosen ones
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common.frozen_features import contents_of, load_features
from benchmarks.common.linear_peer import FeatureData, Settings, evaluate, measure, train
from benchmarks.common.protocol import Protocol
from benchmarks.common.results import print_table, write_result
from umarvel_ray import demo
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.evaluate.results import SCOPES
from umarvel_ray.recipe import Data, Evaluate, load_recipe

VARIED: dict[str, tuple[Any, ...]] = {
    "dimension": (768,),
    "stages": (False,),
    "components": (192, 768),
    "whitening": (0.0, 1.0),
    "pairs": (False,),
    "task_heads": (False,),
    "homogeneous": (True,),
    "batch_size": (512,),
    "extra_negatives": (0, 1024),
    "two_way": (True,),
    "temperature": (0.03, 0.1),
    "learn_temperature": (False,),
    "learning_rate": (3e-4, 3e-3),
    "weight_decay": (0.0, 1.0),
    "dropout": (0.0, 0.4),
    "steps": (300, 1200),
}


def search(data: FeatureData, settings: Evaluate) -> None:
    """Vary each of the chosen settings alone; validation, seed 0."""
    protocol = Protocol(data.dataset, settings, "validation")
    changes = [{}, *({name: value} for name, values in VARIED.items() for value in values)]
    for change in changes:
        recall = evaluate(data, train(data, replace(Settings(), **change), 0), protocol, "validation")
        averages = ", ".join(f"{scope} {recall[scope]['average']:.4f}" for scope in SCOPES)
        print(f"{change or 'chosen'}: {averages}", flush=True)


def print_ladder(result: dict[str, Any], ladder: list[dict]) -> None:
    """The peer beside the demo's ladder, if there is one."""
    for scope in SCOPES:
        rows = []
        for task in result["recall"][scope]:
            figures = [result[name][scope][task] for name in ("chance", "recall", "standard_deviation")]
            figures += [row[scope][task] for row in ladder]
            rows.append((task, str(result["k"].get(task, "")), *(f"{figure:.3f}" for figure in figures)))
        print_table((scope, "k", "chance", "peer", "±", *(row["step"] for row in ladder)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="vary the settings, on validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("runs/peer"), help="folder for the frozen features")
    options = parser.parse_args()
    recipe = load_recipe("demo")
    dataset = open_dataset(Data(root="builtin:demo"))
    data = FeatureData(dataset, load_features(*contents_of(demo.DATA), options.cache), dataset.tasks("test"))
    if options.search:
        search(data, recipe.evaluate)
        return
    result = measure(data, recipe.evaluate, options.seeds)
    write_result("peer", result)
    report = recipe.run_dir / "report" / "metrics.json"
    print_ladder(result, json.loads(report.read_text())["ladder"] if report.exists() else [])


if __name__ == "__main__":
    main()
