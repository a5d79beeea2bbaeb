"""Controls of the demo: does the retriever look at the picture, and does it need both halves of a fused query?

Each test query is embedded as it is, with its picture blanked (white, same size), with its text alone and with its
picture alone, and ranked against its task's own pool. The instruction stays. Prints and writes Recall@k per task.

    python benchmarks/controls.py [recipe=demo] [step=distillation]      → benchmarks/results/controls.json
"""

from __future__ import annotations

import io
import json
import sys
from collections import defaultdict
from pathlib import Path

from local_recall import LocalPools
from PIL import Image

from umarvel_ray import Embedder
from umarvel_ray.data.tables import item_of, open_dataset
from umarvel_ray.items.images import open_image
from umarvel_ray.recipe import load_recipe
from umarvel_ray.runs import Run

RESULTS = Path(__file__).parent / "results" / "controls.json"
INSTRUCTION = "instruction"


def blanked(item: dict) -> dict:
    """The same item with a white picture of the same size."""
    white = Image.new("RGB", open_image(item["image"], "query").size, "white")
    out = io.BytesIO()
    white.save(out, "PNG")
    return item | {"image": out.getvalue()}


def only(key: str):
    """Keep one half of a fused query, and its instruction."""
    return lambda item: {name: item[name] for name in (key, INSTRUCTION) if name in item}


CONTROLS = {
    "as it is": (lambda item: True, lambda item: item),
    "picture blanked": (lambda item: "image" in item, blanked),
    "text only": (lambda item: {"image", "text"} <= item.keys(), only("text")),
    "picture only": (lambda item: {"image", "text"} <= item.keys(), only("image")),
}


def main(source: str, step: str) -> None:
    run = Run.open(load_recipe(source))
    settings, data = run.recipe.evaluate, open_dataset(run.recipe.data)
    embedder = Embedder.from_pretrained(run.checkpoint(step))
    pools = LocalPools(embedder, data, settings)
    table = defaultdict(dict)
    for name, (applies, change) in CONTROLS.items():
        for task, rows in pools.queries().items():
            if queries := [row for row in rows if applies(item_of(row))]:
                vectors = embedder.encode_query([change(item_of(query)) for query in queries])
                table[task][name] = pools.recall(task, queries, vectors)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"checkpoint": step, "recall": table}, indent=1) + "\n")
    print(f"| recall, local, {step} | " + " | ".join(CONTROLS) + " |\n|---|" + "---:|" * len(CONTROLS))
    for task, values in table.items():
        cells = (f"{values[name]:.3f}" if name in values else "" for name in CONTROLS)
        print(f"| {task} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    main(given.get("recipe", "demo"), given.get("step", "distillation"))
