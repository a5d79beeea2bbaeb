"""The recipe that trains on imported data: the demo's base model and steps, with batches that the data can fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from umarvel_ray.errors import UserError

INSTRUCTION_STEPS = 60  # the demo's other phases have fewer
SMALLEST_BATCH = 2  # one query for each of the demo's two workers
FEWEST = 2 * SMALLEST_BATCH  # since each query draws one of its positives, a batch may not find all of them
TAUGHT = 330  # queries that the demo's teacher scores


class Size(NamedTuple):
    """Of the training split.

    Attributes:
        distinct: the positives that one batch from a single task can have without repeating one.
    """

    queries: int
    distinct: int


def size_of(shape: np.ndarray, positives: np.ndarray) -> Size:
    """Measure a training split.

    Args:
        shape: int64 (m,), the task of each query.
        positives: int64 (p, 2), a query and a document.
    """
    counts = [0]
    for task in np.unique(shape).tolist():
        own = positives[shape[positives[:, 0]] == task]
        counts.append(min(len(np.unique(own[:, 0])), len(np.unique(own[:, 1]))))
    return Size(len(shape), max(counts))


def batch_of(size: Size, most: int) -> int:
    """A power of two: a quarter of the queries, half of the distinct positives, and `most` at most."""
    limit = max(SMALLEST_BATCH, min(most, size.queries // 4, size.distinct // 2))
    return int(2 ** (limit.bit_length() - 1))


def recipe_tree(name: str, root: Path, size: Size) -> dict[str, Any]:
    """A recipe for a laptop.

    Args:
        root: the data folder.

    Raises:
        UserError: too few positives for a batch.
    """
    if size.distinct < FEWEST:
        raise UserError(
            f"too little to train on: no task has {FEWEST} queries with as many different positives outside validation "
            f"and test, but {size.distinct}; add rows with other content, or lower --holdout"
        )
    return {
        "extends": "demo",
        "name": name,
        "data": {"root": str(root)},
        "stage1": {
            "text": None,
            "image_text": None,
            "instruction": {"batch_size": batch_of(size, 128), "max_steps": INSTRUCTION_STEPS},
        },
        "stage2": {"train": {"batch_size": batch_of(size, 64)}},
        "reranker": {"train": {"batch_size": batch_of(size, 32)}},
        "stage3": {"sample": round(min(1.0, TAUGHT / size.queries), 4)},
        "evaluate": {"k_of": {}},
    }


def write_recipe(path: Path, tree: dict[str, Any]) -> None:
    """Write a recipe that `umarvel train` takes."""
    head = "# Written by `umarvel import`: the demo's tiny base model on this data, on a laptop (docs/your-data.md).\n"
    path.write_text(head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def on_gpus(name: str, root: str, size: Size) -> str:
    """The command that trains a model of useful size on one GPU instead."""
    keys = {
        "data.root": root,
        "data.format": "parquet",
        "output": f"runs/{name}-2b",
        "stage1.text": "null",
        "stage1.image_text": "null",
        "cluster.workers": 1,
        "cluster.embedders": 1,
        "stage1.instruction.batch_size": batch_of(size, 1024),
        "stage2.train.batch_size": batch_of(size, 256),
        "reranker.train.batch_size": batch_of(size, 128),
        "stage3.train.batch_size": batch_of(size, 128),
    }
    return " ".join(["umarvel train qwen2vl-2b", *(f"{key}={value}" for key, value in keys.items())])
