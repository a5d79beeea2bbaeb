"""The batch plan: which queries and documents meet in each optimizer step.

A plan is a pure function of (tables, phase, seed). For contrastive phases:

1. Each epoch permutes the queries and draws one positive for each.
2. Queries are grouped: by task for the homogeneous share, together otherwise.
3. Each group is cut into batches in which no two queries have the same positive.
4. A batch becomes a `PlanStep`: its distinct documents, and columns that point into them.

The plan is the whole order of a training run, so a resumed run continues it from a step number, and any number of ranks
slices the same global batch. Every listed positive that is present in a step is recorded, so that the loss never treats
it as a negative (docs/method.md#in-batch-false-negatives).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_path
from umarvel_ray.recipe import Phase, count_steps


@dataclass(frozen=True)
class PlanStep:
    """One optimizer step over all ranks, with N queries and M documents.

    `arrays` holds, by kind of phase:
      contrastive: `targets` int32 (N,), column of each query's positive; `relevant` int32 (R, 2), row and column of
        every positive; `own` int32 (S, 2), row and column of each query's own negatives if no others count.
      distill: `candidates` int32 (N, K), columns, −1 for padding; `teacher` float32 (N, K), fused scores.
      rerank: `answers` int32 (N,), 1 for yes; queries and documents are aligned pairs, N = M.
    """

    step: int
    query_ids: list[str]
    document_ids: list[str]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class QueryRows:
    """The columns of a query table that planning needs."""

    ids: list[str]
    tasks: list[str]
    positives: list[list[str]]

    @classmethod
    def of(cls, table: pa.Table) -> QueryRows:
        return cls(
            table["id"].to_pylist(),
            table["task"].to_pylist(),
            table["positive_ids"].to_pylist(),
        )


def contrastive_plan(
    queries: QueryRows,
    phase: Phase,
    seed: int,
    negatives: Mapping[str, Sequence[str]] | None = None,
    per_query: int = 0,
    in_batch: bool = True,
) -> list[PlanStep]:
    """Plan InfoNCE batches.

    Args:
        negatives: mined documents by query id.
        per_query: how many of them to add per query.
        in_batch: whether the documents of a batch's other queries are negatives too.

    Raises:
        UserError: too few queries with distinct positives to fill one batch.
    """
    plan = []
    # 4. Point from queries to columns of the batch's distinct documents.
    for number, rows in enumerate(_batches(queries, phase, seed)):
        drawn = [row.positive for row in rows]
        mined = [list((negatives or {}).get(queries.ids[row.index], ()))[:per_query] for row in rows]
        documents = list(dict.fromkeys([*drawn, *(d for own in mined for d in own)]))
        column = {d: j for j, d in enumerate(documents)}
        relevant = [(i, column[d]) for i, row in enumerate(rows) for d in queries.positives[row.index] if d in column]
        arrays = {
            "targets": np.array([column[d] for d in drawn], dtype=np.int32),
            "relevant": _pairs(relevant),
        }
        if not in_batch:
            arrays["own"] = _pairs([(i, column[d]) for i, own in enumerate(mined) for d in own])
        plan.append(PlanStep(number, [queries.ids[row.index] for row in rows], documents, arrays))
    return plan


def distillation_plan(
    query_ids: Sequence[str],
    candidates: Sequence[Sequence[str]],
    teacher: Sequence[Sequence[float]],
    phase: Phase,
    seed: int,
) -> list[PlanStep]:
    """Plan batches of queries with their own top-k candidates and teacher scores (docs/method.md#distillation)."""
    plan = []
    width = max(len(c) for c in candidates)
    order = _epochs(len(query_ids), seed)
    for number in range(count_steps(phase, len(query_ids))):
        rows = [next(order) for _ in range(min(phase.batch_size, len(query_ids)))]
        documents = list(dict.fromkeys(d for r in rows for d in candidates[r]))
        column = {d: j for j, d in enumerate(documents)}
        index = np.full((len(rows), width), -1, dtype=np.int32)
        scores = np.zeros((len(rows), width), dtype=np.float32)
        for i, r in enumerate(rows):
            index[i, : len(candidates[r])] = [column[d] for d in candidates[r]]
            scores[i, : len(candidates[r])] = teacher[r]
        plan.append(PlanStep(number, [query_ids[r] for r in rows], documents, {"candidates": index, "teacher": scores}))
    return plan


def continue_hard_plan(
    queries: QueryRows, candidates: Mapping[str, Sequence[str]], phase: Phase, seed: int
) -> list[PlanStep]:
    """Plan the control for distillation: InfoNCE batches in which a query's own candidates are its only negatives.

    As in the paper's control (docs/method.md#distillation): one positive per query; positives are removed from the
    candidates.
    """
    negatives = {
        id_: [document for document in candidates.get(id_, ()) if document not in positives]
        for id_, positives in zip(queries.ids, queries.positives, strict=True)
    }
    per_query = max(map(len, negatives.values()))
    return contrastive_plan(queries, phase, seed, negatives, per_query, in_batch=False)


def rerank_plan(queries: QueryRows, negatives: Mapping[str, Sequence[str]], phase: Phase, seed: int) -> list[PlanStep]:
    """Plan pairs for the reranker: one positive and one mined negative per query (docs/method.md#reranker).

    Raises:
        UserError: no query has a mined negative.
    """
    usable = [i for i, q in enumerate(queries.ids) if negatives.get(q)]
    if not usable:
        raise UserError("no query has a mined negative; run mining first, or raise mining.depth or max_similarity")
    plan = []
    order = _epochs(len(usable), seed)
    for number in range(count_steps(phase, len(usable))):
        rng = np.random.default_rng((seed, number))
        query_ids, document_ids, answers = [], [], []
        for i in (usable[next(order)] for _ in range(phase.batch_size)):
            for choices, answer in ((queries.positives[i], 1), (negatives[queries.ids[i]], 0)):
                query_ids.append(queries.ids[i])
                document_ids.append(choices[int(rng.integers(len(choices)))])
                answers.append(answer)
        plan.append(PlanStep(number, query_ids, document_ids, {"answers": np.array(answers, dtype=np.int32)}))
    return plan


def rank_slice(n: int, rank: int, world: int) -> slice:
    """A rank's contiguous share of n rows; shares differ by at most one row."""
    return slice(rank * n // world, (rank + 1) * n // world)


def write_plan(plan: Sequence[PlanStep], path: Path) -> None:
    """Store a plan as a Parquet table: one row per step, arrays as nested lists."""
    names = plan[0].arrays.keys()
    columns = {
        "step": [p.step for p in plan],
        "query_ids": [p.query_ids for p in plan],
        "document_ids": [p.document_ids for p in plan],
        **{name: [p.arrays[name].tolist() for p in plan] for name in names},
    }
    with atomic_path(path) as partial:
        pq.write_table(pa.table(columns), partial)


def read_plan(path: Path) -> list[PlanStep]:
    """Read what `write_plan` wrote."""
    rows = pq.read_table(path).to_pylist()
    return [
        PlanStep(
            row.pop("step"),
            row.pop("query_ids"),
            row.pop("document_ids"),
            {name: _as_array(name, value) for name, value in row.items()},
        )
        for row in rows
    ]


@dataclass(frozen=True)
class _Drawn:
    index: int
    positive: str


def _batches(queries: QueryRows, phase: Phase, seed: int) -> Iterator[list[_Drawn]]:
    in_epoch = sum(min(count, phase.max_per_task or count) for count in Counter(queries.tasks).values())
    total = count_steps(phase, in_epoch)
    made, epoch = 0, 0
    while made < total:
        before = made
        for batch in _epoch_batches(queries, phase, np.random.default_rng((seed, epoch))):
            yield batch
            made += 1
            if made == total:
                return
        if made == before:
            raise UserError(
                f"queries '{phase.queries}' cannot fill one batch of {phase.batch_size} with distinct positives"
                f"{' from one task' if phase.homogeneous else ''}; lower batch_size"
            )
        epoch += 1


def _epoch_batches(queries: QueryRows, phase: Phase, rng: np.random.Generator) -> list[list[_Drawn]]:
    # 1. Permute the queries and draw one positive for each.
    drawn = [
        _Drawn(int(i), queries.positives[i][rng.integers(len(queries.positives[i]))])
        for i in rng.permutation(len(queries.ids))
    ]
    # 2. Group: by task for the homogeneous share, together otherwise.
    groups: dict[str, list[_Drawn]] = {}
    used: Counter[str] = Counter()
    for row in drawn:
        used[queries.tasks[row.index]] += 1
        if phase.max_per_task and used[queries.tasks[row.index]] > phase.max_per_task:
            continue
        alike = rng.random() < phase.homogeneous
        groups.setdefault(queries.tasks[row.index] if alike else "", []).append(row)
    # 3. Cut each group into batches with distinct positives.
    batches = [batch for rows in groups.values() for batch in _distinct_batches(rows, phase.batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))] if phase.homogeneous else batches


def _distinct_batches(rows: Sequence[_Drawn], size: int) -> Iterator[list[_Drawn]]:
    """Full batches in order; a row whose positive is already in the batch is held for the next one."""
    waiting: deque[_Drawn] = deque()
    fresh = iter(rows)
    while True:
        batch: list[_Drawn] = []
        taken: set[str] = set()
        held: deque[_Drawn] = deque()
        while len(batch) < size:
            row = waiting.popleft() if waiting else next(fresh, None)
            if row is None:
                return
            if row.positive in taken:
                held.append(row)
            else:
                taken.add(row.positive)
                batch.append(row)
        waiting.extendleft(reversed(held))
        yield batch


def _epochs(n: int, seed: int) -> Iterator[int]:
    epoch = 0
    while True:
        yield from np.random.default_rng((seed, epoch)).permutation(n).tolist()
        epoch += 1


def _as_array(name: str, value: list[Any]) -> np.ndarray:
    array = np.array(value, dtype=np.float32 if name == "teacher" else np.int32)
    return array.reshape(-1, 2) if name in ("relevant", "own") else array


def _pairs(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)
