"""What can be known about a job's data before Ray starts, so that a fault is not said after hours of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from umarvel_ray.data.dataset import Dataset, Queries, Selection
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.reranked import VALIDATION
from umarvel_ray.items.encoder import ItemEncoder
from umarvel_ray.items.item import readable
from umarvel_ray.items.pair_encoder import PairEncoder
from umarvel_ray.recipe import (
    DISTILLATION,
    HARD_NEGATIVES,
    KEYS,
    RERANKER,
    STAGE1,
    ContrastivePhase,
    Recipe,
)
from umarvel_ray.runs import Run

TRAINED = {  # the phases that a job trains
    "pipeline": tuple(KEYS),
    "stage1": STAGE1,
    "stage2": (HARD_NEGATIVES,),
    "reranker": (RERANKER,),
    "stage3": (DISTILLATION,),
}
MINING = ("pipeline", "mine", "stage2", "reranker")  # the jobs that mine
INSTRUCTIONS = 1000  # distinct ones of a table that are looked at
SHOWN = 60  # characters of an instruction in an error
READ_ROWS = 4096


def check_job(run: Run, job: str) -> None:
    """Look at every table that a job of `pipeline.JOBS` reads.

    Raises:
        UserError: see `Dataset.validate`, `Dataset.check_pools`; an instruction so long that its queries' texts would
            not be read; fewer queries than a phase needs.
    """
    recipe = run.recipe
    phases = {name: phase for name, phase in recipe.phases().items() if name in TRAINED.get(job, ())}
    searched = _searched(recipe, job)
    tables = list(dict.fromkeys([*(phase.queries for phase in phases.values()), *searched]))
    if not tables:
        return
    data = run.open_dataset()
    for name in tables:
        data.validate(name)
    for name in searched:
        data.check_pools(name)
    check_instructions(run, data, tables, _reranked(recipe, tuple(phases)))
    for name in phases:
        check_enough(data, recipe, name)


def check_instructions(run: Run, data: Dataset, tables: list[str], reranked: set[str]) -> None:
    """Make sure that the texts of all queries are read, by the embedder and, for some tables, by the reranker.

    Raises:
        UserError: an instruction leaves no room for them.
    """
    settings, limit = run.recipe.model, run.recipe.reranker.max_text_tokens
    items = ItemEncoder.from_pretrained(run.base, settings)
    embedder = "model.max_text_tokens", settings.max_text_tokens, items.leaves_room
    reranker = "reranker.max_text_tokens", limit, PairEncoder(items, limit).leaves_room
    for name in tables:
        for key, tokens, leaves_room in (embedder, reranker) if name in reranked else (embedder,):
            if long := _without_room(data.queries(name), leaves_room):
                raise UserError(
                    f"{data.root}: {name}: {key} {tokens} leaves no room for a text after the instruction "
                    f"'{long[:SHOWN]}'; raise it"
                )


def check_enough(data: Dataset, recipe: Recipe, name: str) -> None:
    """Make sure that a phase has the queries of one batch; how many are set aside is only known later.

    Raises:
        UserError: it has fewer.
    """
    phase = recipe.phases()[name]
    queries = data.queries(phase.queries)
    count, table = queries.n, f"{data.root}: '{phase.queries}'"
    if name == DISTILLATION:
        count = sampled_count(recipe, queries.n, table)
    elif name in (HARD_NEGATIVES, RERANKER):
        count = min(count, recipe.stage2.mining.max_queries or count)
    if name == RERANKER and not _some_negative(data, queries, phase.queries):
        raise UserError(
            f"{table}: no query has another document in its pool than its positives; add documents to the pools"
        )
    if isinstance(phase, ContrastivePhase):
        most = _most_in_a_batch(queries, phase, count)
        if most < phase.batch_size:
            raise UserError(
                f"{table} has {most:,} queries with different positives for one batch, fewer than "
                f"{KEYS[name]}.batch_size ({phase.batch_size:,}); add rows, or lower it"
            )


def sampled_count(recipe: Recipe, queries: int, table: str) -> int:
    """How many queries the teacher of stage 3 scores.

    Args:
        table: names it in the error.

    Raises:
        UserError: none.
    """
    count = round(recipe.stage3.sample * queries)
    if not count:
        raise UserError(
            f"{table}: stage3.sample is {recipe.stage3.sample:g}, none of its {queries:,} queries; raise it"
        )
    return count


def _searched(recipe: Recipe, job: str) -> list[str]:
    """The tables whose queries a job searches for, in their pools."""
    found = []
    if job in MINING:
        found.append(recipe.stage2.train.queries)
        found += [VALIDATION] if recipe.stage2.mining.max_similarity == "calibrate" else []
    if job in ("pipeline", "stage3"):
        found.append(recipe.stage3.train.queries)
    if job in TRAINED and recipe.evaluate.in_training:
        found.append(VALIDATION)
    if job == "pipeline":
        found.append(recipe.evaluate.split)
        found += [VALIDATION] if recipe.evaluate.rerank_weight == "calibrate" else []
    return found


def _reranked(recipe: Recipe, trained: tuple[str, ...]) -> set[str]:
    """The tables whose queries the reranker reads, if it trains or is the teacher."""
    if RERANKER not in trained and DISTILLATION not in trained:
        return set()
    return {recipe.reranker.train.queries, recipe.stage3.train.queries, recipe.evaluate.split, VALIDATION}


def _without_room(queries: Queries, leaves_room: Callable[[str], bool]) -> str | None:
    """The first instruction after which a query's text would not be read."""
    codes, instructions = queries.table.codes("instruction")
    for code, instruction in enumerate(instructions[:INSTRUCTIONS]):
        if instruction and not leaves_room(instruction) and any(_texts(queries, np.flatnonzero(codes == code))):
            return instruction
    return None


def _texts(queries: Queries, rows: np.ndarray) -> Iterator[str]:
    """The texts of rows; "" for none."""
    for part in Selection(queries.table, rows).parts(READ_ROWS):
        yield from (readable(row["text"] or "") for row in part.table.rows(part.rows, ["text"]))


def _some_negative(data: Dataset, queries: Queries, split: str) -> bool:
    """Whether mining may find one. A pool's positives are in it, as a rule."""
    sizes = np.array([len(data.pools.get((task, split), ())) for task in queries.tasks])
    return bool((queries.positives.counts < sizes[queries.task]).any())


def _most_in_a_batch(queries: Queries, phase: ContrastivePhase, count: int) -> int:
    """The largest batch that `count` of the queries can make, from one task if all of a phase's batches are."""
    sizes, distinct = [], []
    for code in np.unique(queries.task):
        own = queries.take(np.flatnonzero(queries.task == code))
        sizes.append(min(own.n, phase.max_per_task or own.n))
        distinct.append(min(sizes[-1], len(np.unique(own.positives.values))))
    whole = min(sum(sizes), len(np.unique(queries.positives.values)))
    return min(count, max(distinct) if phase.homogeneous == 1 else whole)
