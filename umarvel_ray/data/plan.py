"""The batch plan: which queries meet which documents in which optimiser step.

A plan is a pure function of (tables, phase, seed). It is the whole order of a training run, so a resumed run
replays it from a step number (rule 5) and any number of ranks slices the same global batch (rule 4). Every distinct
document of a step appears once; no two queries of a batch draw the same positive; every listed positive that is
present is recorded so that the loss never punishes it (rule 6).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_path
from umarvel_ray.recipe import Phase, count_steps


@dataclass(frozen=True)
class PlanStep:
    """One optimiser step over all ranks.

    `arrays` by kind of step, with N queries and M documents:
      contrastive: `targets` (N,) column of each query's positive; `relevant` (R, 2) row and column of every positive;
        `own` (S, 2) row and column of every query's own negatives, where no others count.
      distil: `candidates` (N, K) columns, −1 where padded; `teacher` (N, K) fused scores.
      rerank: `answers` (N,) 1 for yes; queries and documents are aligned pairs, N = M.
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
    """InfoNCE batches; `negatives` adds up to `per_query` mined documents to each query's batch.

    Args:
        in_batch: whether the documents of the other queries of a batch are negatives too.

    Raises:
        UserError: fewer queries with distinct positives than one batch needs.
    """
    plan = []
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
    """Batches of queries with their own top-k candidates and fused teacher scores (method section 5)."""
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
    """Distillation's control: InfoNCE batches in which a query's own candidates are its only negatives.

    The method's section 5: one positive each; positives among the candidates are taken out.
    """
    negatives = {
        id_: [document for document in candidates.get(id_, ()) if document not in positives]
        for id_, positives in zip(queries.ids, queries.positives, strict=True)
    }
    most = max(map(len, negatives.values()))
    return contrastive_plan(queries, phase, seed, negatives, most, in_batch=False)


def rerank_plan(queries: QueryRows, negatives: Mapping[str, Sequence[str]], phase: Phase, seed: int) -> list[PlanStep]:
    """Pairs for the Yes/No reranker: for each query one positive and one mined negative (method section 4)."""
    usable = [i for i, q in enumerate(queries.ids) if negatives.get(q)]
    if not usable:
        raise UserError("no query has a mined negative; run mining first, or raise mining.depth or max_similarity")
    plan = []
    order = _epochs(len(usable), seed)
    for number in range(count_steps(phase, len(usable))):
        rng = np.random.default_rng((seed, number))
        query_ids, document_ids, answers = [], [], []
        for i in (usable[next(order)] for _ in range(phase.batch_size)):
            for pool, answer in ((queries.positives[i], 1), (negatives[queries.ids[i]], 0)):
                query_ids.append(queries.ids[i])
                document_ids.append(pool[rng.integers(len(pool))])
                answers.append(answer)
        plan.append(PlanStep(number, query_ids, document_ids, {"answers": np.array(answers, dtype=np.int32)}))
    return plan


def rank_slice(n: int, rank: int, world: int) -> slice:
    """The contiguous share of n rows that belongs to a rank; shares differ by at most one row."""
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
    drawn = [
        _Drawn(int(i), queries.positives[i][rng.integers(len(queries.positives[i]))])
        for i in rng.permutation(len(queries.ids))
    ]
    groups: dict[str, list[_Drawn]] = {}
    used: Counter[str] = Counter()
    for row in drawn:
        used[queries.tasks[row.index]] += 1
        if phase.max_per_task and used[queries.tasks[row.index]] > phase.max_per_task:
            continue
        alike = rng.random() < phase.homogeneous
        groups.setdefault(queries.tasks[row.index] if alike else "", []).append(row)
    batches = [batch for rows in groups.values() for batch in _distinct_batches(rows, phase.batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))] if phase.homogeneous else batches


def _distinct_batches(rows: Sequence[_Drawn], size: int) -> Iterator[list[_Drawn]]:
    """Full batches in order; a row whose positive is already in the batch waits for the next one."""
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


def _as_array(name: str, value: list) -> np.ndarray:
    array = np.array(value, dtype=np.float32 if name == "teacher" else np.int32)
    return array.reshape(-1, 2) if name in ("relevant", "own") else array


def _pairs(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)
