"""The stream of encoded batches: Ray Data prepares one row per step of the batch plan, in order, ahead of the trainer.

Each rank opens a stream over its own slice of the plan; CPU tasks anywhere in the cluster read, decode, resize and
tokenize. Plan rows carry row numbers and the tables are in the object store, so a task touches only its own rows.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, ExecutionResources

from umarvel_ray.compat.ray import pause_scheduling
from umarvel_ray.data.plan import PlanStep, rank_slice
from umarvel_ray.data.tables import item_of
from umarvel_ray.errors import UserError
from umarvel_ray.items.encoder import EncodedItem, ItemEncoder
from umarvel_ray.items.item import Item
from umarvel_ray.items.pair_encoder import EncodedPair, PairEncoder
from umarvel_ray.recipe import ModelSettings


@dataclass(frozen=True)
class Tables:
    """Where a plan's items come from: both tables in the object store, and what the encoders are built from.

    Attributes:
        processor: directory with tokenizer, chat template and image processor.
    """

    queries: ray.ObjectRef
    documents: ray.ObjectRef
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
    plan: Sequence[PlanStep], tables: Tables, rank: int, world: int, pairs: bool, tasks: int, cpus: float
) -> Iterator[RankItems | RankPairs]:
    """Encoded batches of one rank, in plan order.

    Args:
        pairs: encode aligned (query, document) pairs for the reranker instead of separate items.
        tasks: preprocessing tasks that may run at once for this rank.
        cpus: logical CPUs of each task.

    Raises:
        UserError: the plan names a row that the tables do not have.
    """
    if not plan:
        return
    query_row = _row_numbers(ray.get(tables.queries))
    document_row = _row_numbers(ray.get(tables.documents))
    rows = []
    for step in plan:
        q = step.query_ids[rank_slice(len(step.query_ids), rank, world)]
        d = step.document_ids[rank_slice(len(step.document_ids), rank, world)]
        row = {
            "queries": [_find(query_row, i, "query") for i in q],
            "documents": [_find(document_row, i, "document") for i in d],
        }
        if pairs:
            row["answers"] = step.arrays["answers"][rank_slice(len(step.query_ids), rank, world)].tolist()
        rows.append(row)
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=tasks * cpus)
    context.enable_progress_bars = False
    pause_scheduling(context)
    with DataContext.current(context):
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            cast(Any, _encode_row), batch_size=1, num_cpus=cpus, fn_kwargs={"tables": tables, "pairs": pairs}
        )
        stream = dataset.iter_batches(batch_size=1, prefetch_batches=2 * tasks, batch_format="pyarrow")
        encoded: Any
        for step, encoded in zip(plan, stream, strict=True):
            first, second = pickle.loads(encoded["payload"][0].as_buffer())
            yield RankPairs(step, first) if pairs else RankItems(step, first, second)


def _encode_row(rows: dict[str, np.ndarray], tables: Tables, pairs: bool) -> dict[str, list[bytes]]:
    """A Ray Data batch of one plan row → its pickled items or pairs."""
    queries, documents = ray.get([tables.queries, tables.documents])
    q, d = rows["queries"][0], rows["documents"][0]
    payload: tuple[list[Any], list[Any] | None]
    if pairs:
        pair_encoder = _pair_encoder(tables.processor, tables.settings)
        aligned = zip(_items(queries, q), _items(documents, d), rows["answers"][0], strict=True)
        payload = ([pair_encoder.encode(query, document, bool(answer)) for query, document, answer in aligned], None)
    else:
        encoder = _item_encoder(tables.processor, tables.settings)
        payload = (
            [encoder.encode(item, "query") for item in _items(queries, q)],
            [encoder.encode(item, "document") for item in _items(documents, d)],
        )
    return {"payload": [pickle.dumps(payload, protocol=5)]}


def _items(table: pa.Table, rows: np.ndarray) -> list[Item]:
    return [item_of(row) for row in table.take(pa.array(rows, type=pa.int64())).to_pylist()]


def _row_numbers(table: pa.Table) -> dict[str, int]:
    return {name: i for i, name in enumerate(table["id"].to_pylist())}


def _find(row_of: dict[str, int], name: str, kind: str) -> int:
    if name not in row_of:
        raise UserError(f"plan: {kind} '{name}' is in no table; remove the plan from the run folder to rebuild it")
    return row_of[name]


@lru_cache(maxsize=2)
def _item_encoder(path: str, settings: ModelSettings) -> ItemEncoder:
    return ItemEncoder.from_pretrained(path, settings)


@lru_cache(maxsize=2)
def _pair_encoder(path: str, settings: ModelSettings) -> PairEncoder:
    return PairEncoder.from_pretrained(path, settings, settings.max_text_tokens)
