"""The instructions that a dataset's own queries carry."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from umarvel_ray.data.dataset import Dataset

SPLITS = ("test", "validation", "train")


class Instruction(NamedTuple):
    """What one kind of a task's queries asks for; modalities are written as in the tables, such as "image,text"."""

    text: str
    task: str
    query: str
    finds: str


def instructions_of(dataset: Dataset, split: str) -> list[Instruction]:
    """For each task, modality of the query and modality of its first positive, the most frequent instruction.

    The tasks are in the order of the table; queries without an instruction say nothing.

    Raises:
        UserError: see `open_dataset`.
    """
    queries = dataset.queries(split)
    text, texts = queries.table.codes("instruction")
    asked, modalities = queries.table.codes("modality")
    found, kinds = dataset.documents.codes("modality")
    first = queries.positives.values[queries.positives.offsets[:-1]]
    keys = np.stack([queries.task, asked[queries.rows], found[first], text[queries.rows]])[:, text[queries.rows] >= 0]
    best: dict[tuple[int, ...], int] = {}
    for (*kind, instruction), _ in Counter(zip(*keys.tolist(), strict=True)).most_common():
        best.setdefault(tuple(kind), instruction)
    return [
        Instruction(texts[instruction], queries.tasks[task], modalities[query], kinds[target])
        for (task, query, target), instruction in sorted(best.items())
    ]
