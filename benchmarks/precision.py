"""Low precision: how fast the demo's checkpoint embeds its test split in fp32, bf16 and int8, and what recall it keeps.

int8: the language model's linear layers quantised dynamically by PyTorch, on a CPU. The product offers fp32 and bf16.

    python benchmarks/precision.py [recipe=demo] [step=distillation]      → benchmarks/results/precision.json
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path

import torch
from local_recall import LocalPools
from torch import nn

from umarvel_ray import Embedder
from umarvel_ray.data.tables import item_of, open_dataset
from umarvel_ray.evaluate.metrics import mean
from umarvel_ray.recipe import load_recipe
from umarvel_ray.runs import Run

RESULTS = Path(__file__).parent / "results" / "precision.json"


def load(path: Path, precision: str) -> Embedder:
    """The checkpoint in float32, bfloat16 or int8."""
    if precision != "int8":
        return Embedder.from_pretrained(path, dtype=precision)
    embedder = Embedder.from_pretrained(path)
    core = embedder.model.backbone.model
    core.language_model = torch.ao.quantization.quantize_dynamic(core.language_model, {nn.Linear}, dtype=torch.qint8)
    return embedder


def main(source: str, step: str) -> None:
    run = Run.open(load_recipe(source))
    settings, data = run.recipe.evaluate, open_dataset(run.recipe.data)
    found = {}
    for precision in ("float32", "bfloat16", "int8"):
        embedder = load(run.checkpoint(step), precision)
        begin = time.perf_counter()
        pools = LocalPools(embedder, data, settings)
        queries = pools.queries()
        vectors = {task: embedder.encode_query([item_of(row) for row in rows]) for task, rows in queries.items()}
        seconds = time.perf_counter() - begin
        items = len(pools.ids) + sum(map(len, queries.values()))
        recall = mean([pools.recall(task, rows, vectors[task]) for task, rows in queries.items()])
        found[precision] = {"items_per_s": items / seconds, "recall": recall}
        print(f"{precision:9} {items / seconds:7.1f} items/s   average local recall {recall:.4f}", flush=True)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    record = {"checkpoint": step, "items": items, "precision": found, "versions": versions}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    main(given.get("recipe", "demo"), given.get("step", "distillation"))
