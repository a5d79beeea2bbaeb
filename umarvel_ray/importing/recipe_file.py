"""The recipe that trains on imported data: the demo's base model and steps, with batches that the data can fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

INSTRUCTION_STEPS = 60  # the demo's other phases have fewer
LARGEST_BATCH = 128
SMALLEST_BATCH = 2  # one query for each of the demo's two workers
TAUGHT = 330  # queries that the demo's teacher scores


def batch_of(queries: int, documents: int, most: int) -> int:
    """A power of two: a quarter of the queries, half of the distinct documents, and `most` at most."""
    limit = max(SMALLEST_BATCH, min(most, queries // 4, documents // 2))
    return int(2 ** (limit.bit_length() - 1))


def recipe_tree(name: str, root: Path, queries: int, documents: int) -> dict[str, Any]:
    """A recipe for a laptop.

    Args:
        root: the data folder.
        queries, documents: in the training split.
    """
    return {
        "extends": "demo",
        "name": name,
        "data": {"root": str(root)},
        "stage1": {
            "text": None,
            "image_text": None,
            "instruction": {"batch_size": batch_of(queries, documents, 128), "max_steps": INSTRUCTION_STEPS},
        },
        "stage2": {"train": {"batch_size": batch_of(queries, documents, 64)}},
        "reranker": {"train": {"batch_size": batch_of(queries, documents, 32)}},
        "stage3": {"sample": round(min(1.0, TAUGHT / queries), 4)},
        "evaluate": {"k_of": {}},
    }


def write_recipe(path: Path, tree: dict[str, Any]) -> None:
    """Write a recipe that `umarvel train` takes."""
    head = "# Written by `umarvel import`: the demo's tiny base model on this data, on a laptop (docs/your-data.md).\n"
    path.write_text(head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def on_gpus(name: str, root: str, queries: int, documents: int) -> str:
    """The command that trains a model of useful size on one GPU instead."""
    keys = {
        "data.root": root,
        "data.format": "parquet",
        "output": f"runs/{name}-2b",
        "stage1.text": "null",
        "stage1.image_text": "null",
        "cluster.workers": 1,
        "cluster.embedders": 1,
        "stage1.instruction.batch_size": batch_of(queries, documents, 1024),
        "stage2.train.batch_size": batch_of(queries, documents, 256),
        "reranker.train.batch_size": batch_of(queries, documents, 128),
        "stage3.train.batch_size": batch_of(queries, documents, 128),
    }
    return " ".join(["umarvel train qwen2vl-2b", *(f"{key}={value}" for key, value in keys.items())])
