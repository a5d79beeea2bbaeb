"""The recipe that trains on imported data: the demo's base model and steps, with batches that the data can fill."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from umarvel_ray.errors import UserError

INSTRUCTION_STEPS = 60  # the demo's other phases have fewer
SMALLEST_BATCH = 2  # one query for each of the demo's two workers
FEWEST = 2 * SMALLEST_BATCH  # since each query draws one of its positives, a batch may not find all of them
TAUGHT = 330  # queries that the demo's teacher scores
SHARE_TAUGHT = 0.1  # of the queries, in the recipe for GPUs
CALIBRATED = 10  # validation queries of a task, below which what is calibrated on them is chance
KEEP_ALL = 1.0  # no negative is too similar


class Size(NamedTuple):
    """Of the training split.

    Attributes:
        distinct: positives that one batch from a single task can have without repeating one; at least half of the most.
        validation: the queries of validation in the task that has fewest.
    """

    queries: int
    distinct: int
    validation: int

    @property
    def is_tiny(self) -> bool:
        return self.validation < CALIBRATED


def size_of(shape: np.ndarray, positives: np.ndarray, validation: np.ndarray) -> Size:
    """Measure a training split.

    Args:
        shape: int64 (m,), the task of each query.
        positives: int64 (p, 2), a query and a document.
        validation: int64 (v,), the task of each query of validation.
    """
    counts = [0]
    for task in np.unique(shape).tolist():
        own = positives[shape[positives[:, 0]] == task]
        counts.append(_matched(own))
    fewest = min((int((validation == task).sum()) for task in np.unique(shape)), default=0)
    return Size(len(shape), max(counts), fewest)


def _matched(pairs: np.ndarray) -> int:
    """How many queries get a positive of their own, if each takes the first one that is left."""
    queries, positives = set[int](), set[int]()
    for query, positive in pairs.tolist():
        if query not in queries and positive not in positives:
            queries.add(query)
            positives.add(positive)
    return len(queries)


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
        "stage2": {
            "train": {"batch_size": batch_of(size, 64)},
            **({"mining": {"max_similarity": KEEP_ALL}} if size.is_tiny else {}),
        },
        "reranker": {"train": {"batch_size": batch_of(size, 32)}},
        "stage3": {"sample": _taught(size)},
        "evaluate": {"k_of": {}},
    }


def write_recipe(path: Path, tree: dict[str, Any]) -> None:
    """Write a recipe that `umarvel train` takes."""
    head = "# Written by `umarvel import`: the demo's tiny base model on this data, on a laptop (docs/your-data.md).\n"
    path.write_text(head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def on_gpus(name: str, root: str, size: Size) -> str:
    """The command that trains a model of useful size on one GPU instead."""
    keys: dict[str, str | float | None] = {
        "data.root": root,
        "data.format": "parquet",
        "output": f"runs/{name}-2b",
        "stage1.text": None,
        "stage1.image_text": None,
        "cluster.workers": 1,
        "cluster.embedders": 1,
        "stage1.instruction.batch_size": batch_of(size, 1024),
        "stage2.train.batch_size": batch_of(size, 256),
        "reranker.train.batch_size": batch_of(size, 128),
        "stage3.train.batch_size": batch_of(size, 128),
    }
    if SHARE_TAUGHT * size.queries < TAUGHT:
        keys["stage3.sample"] = _taught(size)
    if size.is_tiny:
        keys["stage2.mining.max_similarity"] = KEEP_ALL
    changes = (shlex.quote(f"{key}={_as_yaml(value)}") for key, value in keys.items())
    return " ".join(["umarvel train qwen2vl-2b", *changes])


def _taught(size: Size) -> float:
    """The share of the queries that the teacher scores, at least one."""
    return max(round(min(1.0, TAUGHT / size.queries), 4), 1e-4)


def _as_yaml(value: str | float | None) -> str:
    """The value as YAML: texts that it would read as something else, such as `12` or `a #1: b`, are quoted."""
    text = "null" if value is None else str(value)
    try:
        plain = yaml.safe_load(text) == value
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)
