"""The batch plan: which queries and documents meet in each optimizer step.

A plan is a pure function of (tables, phase, seed), in row numbers of the tables. For contrastive phases:

1. Each epoch permutes the queries and draws one positive for each.
2. Queries are grouped: by task for the homogeneous share, together otherwise.
3. Each group is cut into batches in which no two queries have the same positive.
4. A batch becomes a `PlanStep`: its distinct documents, and columns that point into them.

The plan is the whole order of a training run, so a resumed run continues it from a step number, and any number of ranks
slices the same global batch. Every document of a step with the content of one of a query's listed positives is
recorded, so that the loss never treats it as a negative (docs/method.md#in-batch-false-negatives).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from umarvel_ray.data.dataset import Queries
from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_path
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import Phase, RerankPhase, count_steps

STEP_COLUMNS = ("step", "queries", "documents")
ANY_TASK = -1
EMPTY_EPOCHS = 10  # in a row: which positives few queries draw is chance, so another epoch may fill a batch
_IDENTITY = b"umarvel.identity"


@dataclass(frozen=True)
class PlanStep:
    """One optimizer step over all ranks, with N queries and M documents: their row numbers, int64.

    `arrays` holds, by kind of phase:
      contrastive: `targets` int32 (N,), column of each query's positive; `relevant` int32 (R, 2), row and column of
        every document with the content of a positive; `own` int32 (S, 2), row and column of each query's own negatives
        if no others count.
      distill: `candidates` int32 (N, K), columns, −1 for padding; `teacher` float32 (N, K), fused scores.
      rerank: `answers` int32 (N,), 1 for yes; queries and documents are aligned pairs, N = M.
    """

    step: int
    queries: np.ndarray
    documents: np.ndarray
    arrays: dict[str, np.ndarray]


def contrastive_plan(
    queries: Queries,
    phase: Phase,
    seed: int,
    content: np.ndarray,
    negatives: Ragged | None = None,
    per_query: int = 0,
    in_batch: bool = True,
) -> list[PlanStep]:
    """Plan InfoNCE batches.

    Args:
        content: for each document, a number that is equal for documents with equal content.
        negatives: each query's mined documents.
        per_query: how many of them to add per query.
        in_batch: whether the documents of a batch's other queries are negatives too.

    Raises:
        UserError: too few queries with distinct positives to fill one batch.
    """
    plan = []
    # 4. Point from queries to columns of the batch's distinct documents.
    for number, drawn in enumerate(_batches(queries, phase, seed)):
        mined = [negatives.at(row.query)[:per_query].tolist() if negatives is not None else [] for row in drawn]
        documents = list(dict.fromkeys([*(row.positive for row in drawn), *(d for own in mined for d in own)]))
        column = {d: j for j, d in enumerate(documents)}
        columns_of: dict[int, list[int]] = {}  # by content
        for j, key in enumerate(content[documents].tolist()):
            columns_of.setdefault(key, []).append(j)
        listed = [set(content[queries.positives.at(row.query)].tolist()) for row in drawn]
        relevant = [(i, j) for i, own in enumerate(listed) for key in own for j in columns_of.get(key, ())]
        arrays = {
            "targets": np.array([column[row.positive] for row in drawn], dtype=np.int32),
            "relevant": _pairs(relevant),
        }
        if not in_batch:
            arrays["own"] = _pairs([(i, column[d]) for i, own in enumerate(mined) for d in own])
        rows = queries.rows[[row.query for row in drawn]]
        plan.append(PlanStep(number, rows, np.array(documents, np.int64), arrays))
    return plan


def distillation_plan(
    queries: np.ndarray, candidates: Ragged, teacher: np.ndarray, phase: Phase, seed: int
) -> list[PlanStep]:
    """Plan batches of queries with their own top-k candidates and teacher scores (docs/method.md#distillation).

    Args:
        queries: row numbers, int64 (n,).
        candidates: each query's documents.
        teacher: the fused scores of all candidates in order, float32.
    """
    plan = []
    width = int(candidates.counts.max())
    order = _epochs(len(queries), seed)
    for number in range(count_steps(phase, len(queries))):
        rows = np.array([next(order) for _ in range(phase.batch_size)])  # repeats where there are fewer queries
        own = candidates.take(rows)
        # The documents in the order in which they first occur.
        distinct, first, inverse = np.unique(own.values, return_index=True, return_inverse=True)
        by_occurrence = np.argsort(first)
        column = np.empty_like(by_occurrence)
        column[by_occurrence] = np.arange(len(distinct))
        inside = np.arange(width) < own.counts[:, None]  # (N, K)
        index = np.full(inside.shape, -1, np.int32)
        index[inside] = column[inverse]
        scores = np.zeros(inside.shape, np.float32)
        scores[inside] = np.concatenate([teacher[candidates.offsets[r] : candidates.offsets[r + 1]] for r in rows])
        arrays = {"candidates": index, "teacher": scores}
        plan.append(PlanStep(number, queries[rows], distinct[by_occurrence], arrays))
    return plan


def continue_hard_plan(
    queries: Queries, candidates: Ragged, phase: Phase, seed: int, content: np.ndarray
) -> list[PlanStep]:
    """Plan the control for distillation: InfoNCE batches in which a query's own candidates are its only negatives.

    As in the paper's control (docs/method.md#distillation): one positive per query; positives are removed from the
    candidates.
    """
    positive = queries.positives.contains_pairs(candidates.owners, candidates.values)
    negatives = candidates.keep(~positive)
    return contrastive_plan(queries, phase, seed, content, negatives, int(negatives.counts.max()), in_batch=False)


def rerank_plan(queries: Queries, mined: Ragged, easy: Ragged, phase: RerankPhase, seed: int) -> list[PlanStep]:
    """Plan pairs for the reranker: per query a positive and up to `phase.negatives` others (docs/method.md#reranker).

    Args:
        mined: each query's candidates that passed the filters. A query without any is left out.
        easy: documents drawn at random from each query's pool.

    Raises:
        UserError: no query has a mined negative.
    """
    usable = np.flatnonzero(mined.counts)
    if not len(usable):
        raise UserError(
            "no query has a mined negative; raise stage2.mining.depth or max_similarity, or lower reranker.min_rank"
        )
    plan = []
    order, total = _epochs(len(usable), seed), count_steps(phase, len(usable))
    for number in range(total):
        rng = np.random.default_rng((seed, number))
        share = 1.0 if number < phase.easy_steps * total else phase.random_mix
        rows, documents, answers = [], [], []
        for i in (int(usable[next(order)]) for _ in range(phase.batch_size)):
            negatives = _drawn_negatives(mined.at(i), easy.at(i), rng.binomial(phase.negatives, share), phase, rng)
            rows += [queries.rows[i]] * (1 + len(negatives))
            documents += [rng.choice(queries.positives.at(i)), *negatives]
            answers += [1] + [0] * len(negatives)
        arrays = {"answers": np.array(answers, dtype=np.int32)}
        plan.append(PlanStep(number, np.array(rows, np.int64), np.array(documents, np.int64), arrays))
    return plan


def _drawn_negatives(
    mined: np.ndarray, easy: np.ndarray, random: int, phase: RerankPhase, rng: np.random.Generator
) -> list[int]:
    """Distinct negatives of a query: `random` of the easy ones, the others mined; where one kind ends, the other."""
    hard, soft = rng.permutation(mined), rng.permutation(easy)
    first = [*soft[:random], *hard[: phase.negatives - random], *soft[random:], *hard[phase.negatives - random :]]
    return list(dict.fromkeys(map(int, first)))[: phase.negatives]


def rank_slice(n: int, rank: int, world: int) -> slice:
    """A rank's contiguous share of n rows; shares differ by at most one row."""
    return slice(rank * n // world, (rank + 1) * n // world)


def write_plan(plan: Sequence[PlanStep], path: Path, identity: str = "") -> None:
    """Store a plan as a Parquet table: one row per step, each array as one flat list.

    Args:
        identity: of the data that it was made from, read back by `plan_identity`.
    """
    names = plan[0].arrays.keys()
    columns = {
        "step": pa.array([p.step for p in plan], pa.int64()),
        "queries": _lists([p.queries for p in plan]),
        "documents": _lists([p.documents for p in plan]),
        **{name: _lists([p.arrays[name].reshape(-1) for p in plan]) for name in names},
    }
    with atomic_path(path) as partial:
        pq.write_table(pa.table(columns, metadata={_IDENTITY: identity}), partial)


def plan_identity(path: Path) -> str:
    """What a stored plan was made from; see `write_plan`."""
    metadata: dict[bytes, bytes] = pq.read_schema(path).metadata or {}
    return metadata.get(_IDENTITY, b"").decode()


def plan_length(path: Path) -> int:
    """The number of steps in a stored plan."""
    return int(pq.read_metadata(path).num_rows)


def read_plan(path: Path, first: int = 0) -> list[PlanStep]:
    """Read what `write_plan` wrote, from the step `first`."""
    table = pq.read_table(path, partitioning=None).slice(first)
    names = [name for name in table.column_names if name not in STEP_COLUMNS]
    columns = {name: _arrays(table[name].combine_chunks()) for name in ("queries", "documents", *names)}
    return [
        PlanStep(
            step,
            columns["queries"][i],
            columns["documents"][i],
            {name: _shaped(name, columns[name][i], len(columns["queries"][i])) for name in names},
        )
        for i, step in enumerate(table["step"].to_pylist())
    ]


def _lists(arrays: Sequence[np.ndarray]) -> pa.LargeListArray:
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _arrays(lists: pa.LargeListArray) -> list[np.ndarray]:
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in pairwise(offsets)]


def _shaped(name: str, flat: np.ndarray, queries: int) -> np.ndarray:
    shape = {"relevant": (-1, 2), "own": (-1, 2), "candidates": (queries, -1), "teacher": (queries, -1)}
    return flat.reshape(shape.get(name, (-1,)))


@dataclass(frozen=True)
class _Drawn:
    """A query by its position, and the positive drawn for it."""

    query: int
    positive: int


def _batches(queries: Queries, phase: Phase, seed: int) -> Iterator[list[_Drawn]]:
    in_epoch = sum(min(count, phase.max_per_task or count) for count in np.bincount(queries.task).tolist())
    total = count_steps(phase, in_epoch)
    made, epoch, empty = 0, 0, 0
    while made < total:
        before = made
        for batch in _epoch_batches(queries, phase, np.random.default_rng((seed, epoch))):
            yield batch
            made += 1
            if made == total:
                return
        empty = empty + 1 if made == before else 0
        if empty == EMPTY_EPOCHS:
            raise UserError(
                f"queries '{phase.queries}' cannot fill one batch of {phase.batch_size} with distinct positives"
                f"{' from one task' if phase.homogeneous else ''}; lower batch_size"
            )
        epoch += 1


def _epoch_batches(queries: Queries, phase: Phase, rng: np.random.Generator) -> list[list[_Drawn]]:
    positives, task = queries.positives, queries.task.tolist()
    # 1. Permute the queries and draw one positive for each.
    drawn = []
    for i in rng.permutation(queries.n).tolist():
        own = positives.at(i)
        drawn.append(_Drawn(i, int(own[rng.integers(len(own))])))
    # 2. Group: by task for the homogeneous share, together otherwise.
    groups: dict[int, list[_Drawn]] = {}
    used: Counter[int] = Counter()
    for row in drawn:
        own_task = task[row.query]
        used[own_task] += 1
        if phase.max_per_task and used[own_task] > phase.max_per_task:
            continue
        alike = rng.random() < phase.homogeneous
        groups.setdefault(own_task if alike else ANY_TASK, []).append(row)
    # 3. Cut each group into batches with distinct positives.
    batches = [batch for rows in groups.values() for batch in _distinct_batches(rows, phase.batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))] if phase.homogeneous else batches


def _distinct_batches(rows: Sequence[_Drawn], size: int) -> Iterator[list[_Drawn]]:
    """Full batches in order; a row whose positive is already in the batch is held for the next one."""
    waiting: deque[_Drawn] = deque()
    fresh = iter(rows)
    while True:
        batch: list[_Drawn] = []
        taken: set[int] = set()
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


def _pairs(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)
