"""The stream of encoded batches: Ray Data prepares the items of the batch plan, in order, ahead of the trainer.

Each rank opens a stream over its own slice of the plan; CPU tasks anywhere in the cluster read, decode, resize and
tokenize. A task gets row numbers and reads these rows from the tables' files. Its output is one row per item, so a step
may be of any size: no cell and no block ever holds a whole one.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
import ray
from ray.data import DataContext, ExecutionResources

from umarvel_ray.compat.ray import pause_scheduling
from umarvel_ray.data.dataset import Selection, item_of
from umarvel_ray.data.plan import PlanStep, rank_slice
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.items.encoder import EncodedItem, ItemEncoder
from umarvel_ray.items.pair_encoder import EncodedPair, PairEncoder
from umarvel_ray.recipe import ModelSettings

T = TypeVar("T")

TASK_ITEMS = 128  # items that one task prepares, or more if there would be too many tasks
MOST_TASKS = 10_000  # of a stream: Ray Data needs about a millisecond to set one up
BLOCK_ITEMS = 16  # items that a task reads and hands over at a time
BLOCK_BYTES = 16 << 20  # up to which Ray Data joins what is handed over


@dataclass(frozen=True)
class PhaseTables:
    """Where a plan's items come from, and what the encoders are built from.

    Attributes:
        processor: directory with tokenizer, chat template and image processor.
    """

    queries: StoredTable
    documents: StoredTable
    processor: str
    settings: ModelSettings


@dataclass(frozen=True)
class RankItems:
    """One rank's share of an embedder step: its slice of the encoded items, and the global plan step."""

    plan: PlanStep
    queries: list[EncodedItem]
    documents: list[EncodedItem]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item."""
        return [item.length for item in [*self.queries, *self.documents]]


@dataclass(frozen=True)
class RankPairs:
    """One rank's share of a reranker step: its slice of the encoded pairs, and the global plan step."""

    plan: PlanStep
    pairs: list[EncodedPair]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair."""
        return [pair.length for pair in self.pairs]


def open_stream(
    plan: Sequence[PlanStep], tables: PhaseTables, rank: int, world: int, pairs: bool, tasks: int, cpus: float
) -> Iterator[RankItems | RankPairs]:
    """Encoded batches of one rank, in plan order.

    Args:
        pairs: encode aligned (query, document) pairs for the reranker instead of separate items.
        tasks: preprocessing tasks that may run at once for this rank.
        cpus: logical CPUs of each task.
    """
    if not plan:
        return
    shares = [_share(step, rank, world, pairs) for step in plan]
    size = max(TASK_ITEMS, sum(len(share["query"]) + len(share["document"]) for share in shares) // MOST_TASKS)
    work = [part for share in shares for part in _parts(share, size)]
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=tasks * cpus)
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    pause_scheduling(context)
    with DataContext.current(context):
        dataset = ray.data.from_items(work, override_num_blocks=len(work)).map_batches(
            cast(Any, _encode), batch_size=1, num_cpus=cpus, fn_kwargs={"tables": tables}
        )
        blocks = dataset.iter_batches(batch_size=None, prefetch_batches=2 * tasks, batch_format="pyarrow")
        encoded: Any = (pickle.loads(cell.as_buffer()) for block in blocks for cell in block["item"])
        for step, share in zip(plan, shares, strict=True):
            first = list(islice(encoded, len(share["query"])))
            yield (
                RankPairs(step, first)
                if pairs
                else RankItems(step, first, list(islice(encoded, len(share["document"]))))
            )


def begin(stream: Iterator[T]) -> Iterator[T]:
    """The same elements, of which the first is already being made: tasks start while the caller loads a model."""
    thread = ThreadPoolExecutor(1)
    first = thread.submit(lambda: list(islice(stream, 1)))
    thread.shutdown(wait=False)

    def elements() -> Iterator[T]:
        yield from first.result()
        yield from stream

    return elements()


def _share(step: PlanStep, rank: int, world: int, pairs: bool) -> dict[str, np.ndarray]:
    """A rank's row numbers of a step: its queries, then its documents, or pairs of both with their answers."""
    share = {
        "query": step.queries[rank_slice(len(step.queries), rank, world)],
        "document": step.documents[rank_slice(len(step.documents), rank, world)],
    }
    if pairs:
        share["answer"] = step.arrays["answers"][rank_slice(len(step.queries), rank, world)]
    return share


def _parts(share: dict[str, np.ndarray], size: int) -> Iterator[dict[str, list[int]]]:
    """What one task prepares, in order: `size` pairs, or `size` items of which queries come before documents."""
    if "answer" in share:
        for start in range(0, len(share["query"]), size):
            yield {name: rows[start : start + size].tolist() for name, rows in share.items()}
        return
    queries, documents = share["query"].tolist(), share["document"].tolist()
    for start in range(0, len(queries) + len(documents), size):
        inside = slice(max(0, start - len(queries)), max(0, start + size - len(queries)))
        yield {"query": queries[start : start + size], "document": documents[inside], "answer": []}


def _encode(work: dict[str, np.ndarray], tables: PhaseTables) -> Iterator[dict[str, list[bytes]]]:
    """A Ray Data batch of one part → its items or pairs, each pickled in a row of its own."""
    query, document, answer = (work[name][0] for name in ("query", "document", "answer"))
    encoded: Iterator[Any]
    encoded = _pairs(query, document, answer, tables) if len(answer) else _items(query, document, tables)
    while block := [pickle.dumps(item, protocol=5) for item in islice(encoded, BLOCK_ITEMS)]:
        yield {"item": block}


def _items(query: np.ndarray, document: np.ndarray, tables: PhaseTables) -> Iterator[EncodedItem]:
    encoder = _item_encoder(tables.processor, tables.settings)
    for side, table, rows in (("query", tables.queries, query), ("document", tables.documents, document)):
        for id_, item in _read(Selection(table, rows)):
            yield encoder.encode(item, side, f"{side} {id_}")


def _pairs(query: np.ndarray, document: np.ndarray, answer: np.ndarray, tables: PhaseTables) -> Iterator[EncodedPair]:
    encoder = _pair_encoder(tables.processor, tables.settings)
    sides = Selection(tables.queries, query), Selection(tables.documents, document)
    for (query_id, first), (document_id, second), yes in zip(*map(_read, sides), answer, strict=True):
        yield encoder.encode(first, second, bool(yes), f"query {query_id} with document {document_id}")


def _read(rows: Selection) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ids and items of rows, of which few are in memory at once."""
    return ((row["id"], item_of(row)) for part in rows.parts(BLOCK_ITEMS) for row in part.items())


@lru_cache(maxsize=2)
def _item_encoder(path: str, settings: ModelSettings) -> ItemEncoder:
    return ItemEncoder.from_pretrained(path, settings)


@lru_cache(maxsize=2)
def _pair_encoder(path: str, settings: ModelSettings) -> PairEncoder:
    return PairEncoder.from_pretrained(path, settings, settings.max_text_tokens)
