"""Low precision: how fast the demo's checkpoint embeds in fp32, bf16 and int8, and what recall each of them loses.

The same sample of the test split's queries and pools for all three (a CPU without bf16 arithmetic takes many times as
long with it), so recall is that of small pools: compare it with fp32's alone. int8: the weights of the
language model's linear layers.

    python benchmarks/precision.py [recipe=demo] [step=distillation] [items=1000]   → benchmarks/results/precision.json
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

import torch
from local_recall import LocalPools

from umarvel_ray import Embedder
from umarvel_ray.data.sample import sample_queries, with_sampled_pools
from umarvel_ray.data.tables import Dataset, item_of, open_dataset
from umarvel_ray.recipe import load_recipe
from umarvel_ray.retrieve.metrics import mean
from umarvel_ray.runs import Run

RESULTS = Path(__file__).parent / "results" / "precision.json"
SEED = 0


def sampled(data: Dataset, split: str, items: int) -> Dataset:
    """About so many items: a quarter queries, half documents from all pools alike, and the queries' positives."""
    data = data.with_queries(split, sample_queries(data.queries(split), items // 4, SEED))
    return with_sampled_pools(data, split, items // (2 * len(data.tasks(split))), SEED)


def main(source: str, step: str, items: int) -> None:
    run = Run.open(load_recipe(source))
    settings = run.recipe.evaluate
    data = sampled(open_dataset(run.recipe.data), settings.split, items)
    found = {}
    for precision in ("float32", "bfloat16", "int8"):
        embedder = Embedder.from_pretrained(run.checkpoint(step), dtype=precision)
        begin = time.perf_counter()
        pools = LocalPools(embedder, data, settings)
        queries = pools.queries()
        vectors = {task: embedder.encode_query([item_of(row) for row in rows]) for task, rows in queries.items()}
        seconds = time.perf_counter() - begin
        count = len(pools.ids) + sum(map(len, queries.values()))
        recall = mean([pools.recall(task, rows, vectors[task]) for task, rows in queries.items()])
        found[precision] = {"items_per_s": count / seconds, "recall": recall}
        lost = found[precision]["recall_lost"] = found["float32"]["recall"] - recall
        said = f"{count / seconds:7.1f} items/s   average local recall {recall:.4f}, {lost:+.4f} lost"
        print(f"{precision:9} {said}", flush=True)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    record = {"checkpoint": step, "items": count, "precision": found, "versions": versions}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    main(given.get("recipe", "demo"), given.get("step", "distillation"), int(given.get("items", 1000)))
