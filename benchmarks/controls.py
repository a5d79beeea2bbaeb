"""Controls on the demo: does the retriever look at the picture, and does it need both halves of a fused query?

Each test query is embedded unchanged, with its picture blanked (white, same size), with its text only and with its
picture only, and ranked in its task's local pool. The instruction is always kept.

    python -m benchmarks.controls [recipe=demo] [phase=distillation]      → benchmarks/results/controls.json
"""

from __future__ import annotations

import io
import sys
from collections import defaultdict
from collections.abc import Callable

from PIL import Image

from benchmarks.common.protocol import Protocol
from benchmarks.common.results import print_table, text_arguments, write_result
from umarvel_ray import Embedder
from umarvel_ray.items.images import open_image
from umarvel_ray.recipe import load_recipe
from umarvel_ray.runs import Run

Change = Callable[[dict], dict]


def with_blank_picture(item: dict) -> dict:
    """The same item with a white picture of the same size."""
    white = Image.new("RGB", open_image(item["image"], "query").size, "white")
    out = io.BytesIO()
    white.save(out, "PNG")
    return item | {"image": out.getvalue()}


def only(key: str) -> Change:
    """One half of a fused query, with the instruction."""
    return lambda item: {name: item[name] for name in (key, "instruction") if name in item}


CONTROLS: dict[str, tuple[set[str], Change]] = {  # name → (keys the query must have, change)
    "unchanged": (set(), lambda item: item),
    "picture blanked": ({"image"}, with_blank_picture),
    "text only": ({"image", "text"}, only("text")),
    "picture only": ({"image", "text"}, only("image")),
}


def main(recipe: str = "demo", phase: str = "distillation") -> None:
    run = Run.open(load_recipe(recipe))
    embedder = Embedder.from_pretrained(run.checkpoint(phase), "cpu")
    protocol = Protocol(run.open_dataset(), run.recipe.evaluate, run.recipe.evaluate.split)
    documents = embedder.encode_document(protocol.document_items())
    recall: dict[str, dict[str, float]] = defaultdict(dict)
    for name, (keys, change) in CONTROLS.items():
        for task, positions in protocol.tasks.items():
            items = protocol.query_items(task)
            usable = [number for number, item in enumerate(items) if keys <= item.keys()]
            if usable:
                vectors = embedder.encode_query([change(items[number]) for number in usable])
                recall[task][name] = protocol.recall(task, positions[usable], vectors, documents)
    write_result("controls", {"checkpoint": phase, "recall": recall})
    print_table(
        (f"local recall, {phase}", *CONTROLS),
        [
            (task, *(f"{values[name]:.3f}" if name in values else "" for name in CONTROLS))
            for task, values in recall.items()
        ],
    )


if __name__ == "__main__":
    main(**text_arguments(sys.argv[1:]))
