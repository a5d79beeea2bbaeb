"""Low precision: how fast the demo's checkpoint embeds in fp32, bf16 and int8, and how much recall each one loses.

All three embed the same sample of the test split's queries and pools, because bf16 takes many times as long on a CPU
without bf16 arithmetic. Small pools raise recall, so compare it with fp32 only. int8 means the linear layers of the
language model. The demo's model is so small that calls cost more than arithmetic, so the speed of int8 is also measured
on larger ones with random weights.

    python -m benchmarks.precision [recipe=demo] [phase=distillation] [items=1000]  → benchmarks/results/precision.json
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.common.items import ItemMaker
from benchmarks.common.protocol import Protocol
from benchmarks.common.results import text_arguments, write_result
from benchmarks.common.small_model import SETTINGS, TEXT_MODEL, VISION_MODEL, make_model
from benchmarks.common.timing import alternate, measure, median_ratio
from umarvel_ray import Embedder
from umarvel_ray.data.dataset import Dataset
from umarvel_ray.data.sample import sample_queries, with_sampled_pools
from umarvel_ray.recipe import load_recipe
from umarvel_ray.retrieve.metrics import mean
from umarvel_ray.runs import Run

SEED = 0
LARGER = {
    "6 x 384": TEXT_MODEL,
    "6 x 896": TEXT_MODEL | {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14},
}
LARGER_ITEMS, ROUNDS = 96, 3


def sampled(data: Dataset, split: str, items: int) -> Dataset:
    """About `items` items: a quarter queries, half documents drawn from all pools, and the queries' positives."""
    data = data.with_queries(split, sample_queries(data.queries(split), items // 4, SEED))
    return with_sampled_pools(data, split, items // (2 * len(data.tasks(split))), SEED)


def main(recipe: str = "demo", phase: str = "distillation", items: str = "1000") -> None:
    run = Run.open(load_recipe(recipe))
    settings = run.recipe.evaluate
    protocol = Protocol(sampled(run.open_dataset(), settings.split, int(items)), settings, settings.split)
    documents = protocol.document_items()
    queries = {task: protocol.query_items(task) for task in protocol.tasks}
    count = len(documents) + sum(map(len, queries.values()))
    figures: dict[str, dict[str, float]] = {}
    for precision in ("float32", "bfloat16", "int8"):
        embedder = Embedder.from_pretrained(run.checkpoint(phase), "cpu", precision)
        vectors = {}

        def embed(embedder: Embedder = embedder, vectors: dict = vectors) -> None:
            vectors["documents"] = embedder.encode_document(documents)
            vectors["queries"] = {task: embedder.encode_query(side) for task, side in queries.items()}

        seconds = measure(embed)["seconds"]
        recall = mean(
            [
                protocol.recall(task, positions, vectors["queries"][task], vectors["documents"])
                for task, positions in protocol.tasks.items()
            ]
        )
        lost = figures["float32"]["recall"] - recall if figures else 0.0
        figures[precision] = {"items_per_s": count / seconds, "recall": recall, "recall_lost": lost}
        print(
            f"{precision:9} {count / seconds:7.1f} items/s   average local recall {recall:.4f}, {lost:+.4f} lost",
            flush=True,
        )
    larger = {name: speed_of_int8(text_model) for name, text_model in LARGER.items()}
    write_result("precision", {"checkpoint": phase, "items": count, "precision": figures, "larger models": larger})


def speed_of_int8(text_model: dict) -> dict[str, float]:
    """How many times as fast as float32, and the least cosine between the vectors of one item."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = ItemMaker(folder / "pictures").items(LARGER_ITEMS)
        vision_model = VISION_MODEL | {"hidden_size": text_model["hidden_size"]}  # what the projector writes
        model = make_model(folder / "model", text_model, vision_model)
        exact, int8 = (Embedder.from_pretrained(model, "cpu", dtype, SETTINGS) for dtype in ("float32", "int8"))
        cosine = float((exact.encode_document(items) * int8.encode_document(items)).sum(1).min())
        times = alternate(
            {"float32": lambda: exact.encode_document(items), "int8": lambda: int8.encode_document(items)}, ROUNDS
        )
    ratio = median_ratio(times["float32"]["seconds"], times["int8"]["seconds"])
    print(f"int8 {ratio:.2f} times as fast as float32, cosine at least {cosine:.4f}", flush=True)
    return {"times_as_fast": ratio, "least_cosine": cosine}


if __name__ == "__main__":
    main(**text_arguments(sys.argv[1:]))
