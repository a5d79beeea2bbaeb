"""Bulk reranking: score each query's candidates with P(yes) on a group of actors; resumable.

    with RerankerGroup(recipe.cluster, recipe.compute) as rerankers:
        scored = score_table(rerankers, candidates, queries, documents, run / "scores", ref)

`scored` is `candidates` with one more column, `rerank_scores`. Callers fuse it with the cosines.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from umarvel_ray.caches import ByteCache
from umarvel_ray.data.content import digest_of_table
from umarvel_ray.data.dataset import ITEM_COLUMNS, Queries, item_of
from umarvel_ray.data.stored import StoredTable
from umarvel_ray.errors import UserError
from umarvel_ray.inference.actors import ActorGroup
from umarvel_ray.inference.gpus import Gpus
from umarvel_ray.inference.shards import close_output, open_output, read_shards, write_shard
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.cpu import prepare_cpu
from umarvel_ray.progress import progress
from umarvel_ray.recipe import Cluster, Compute

if TYPE_CHECKING:
    from umarvel_ray.items.pair_encoder import EncodedPair
    from umarvel_ray.model.reranker import Reranker

SHARD_QUERIES = 64
ENCODED_BYTES = 2**28  # of encoded documents, cached per actor: neighboring queries share many candidates
SCORED = pa.schema(
    [
        ("query", pa.int64()),  # row number in the query table
        ("documents", pa.large_list(pa.int64())),  # row numbers in the document table
        ("scores", pa.large_list(pa.float32())),
        ("rerank_scores", pa.large_list(pa.float32())),
    ]
)


@ray.remote
class RerankerActor:
    """Scores shards on one device."""

    def __init__(self, compute: Compute, device: str, threads: int) -> None:
        prepare_cpu(threads)
        self._device, self._compute = device, compute
        self._loaded: tuple[CheckpointRef, Reranker] | None = None
        self._encoded: ByteCache[Hashable, EncodedPair] = ByteCache(ENCODED_BYTES, lambda pair: pair.nbytes)

    def score_shard(
        self,
        ref: CheckpointRef,
        candidates: pa.Table,
        queries: StoredTable,
        documents: StoredTable,
        folder: Path,
        index: int,
    ) -> int:
        """Score and write one shard; returns the number of input queries."""
        reranker = self._load(ref)
        done, quarantined = [], []
        rows = queries.rows(candidates["query"].to_numpy(), ["id", *ITEM_COLUMNS])
        for row, found in zip(rows, candidates.to_pylist(), strict=True):
            try:
                query = reranker.encoder.encode_query(item_of(row), f"query {row['id']}")
                halves = self._documents(reranker, documents, found["documents"])
                scores = reranker.score_encoded(query, halves, self._compute.token_budget)
                done.append(found | {"rerank_scores": scores.tolist()})
            except UserError as error:
                quarantined.append((row["id"], str(error)))
        write_shard(folder, index, pa.Table.from_pylist(done, schema=SCORED), quarantined)
        return candidates.num_rows

    def _load(self, ref: CheckpointRef) -> Reranker:
        from umarvel_ray.model.reranker import Reranker  # keeps the model code out of the driver

        if self._loaded is None or self._loaded[0] != ref:
            self._encoded.clear()
            self._loaded = None  # frees the old weights before the new ones are read
            self._loaded = (
                ref,
                Reranker.from_pretrained(ref.path, self._device, self._compute.dtype, settings=ref.settings),
            )
        return self._loaded[1]

    def _documents(self, reranker: Reranker, documents: StoredTable, rows: list[int]) -> list[EncodedPair]:
        """The encoded halves of a query's candidates; only those that are not cached are read."""
        halves = {row: self._encoded.get((documents.path, row)) for row in rows}
        missing = [row for row, half in halves.items() if half is None]
        for number, row in zip(missing, documents.rows(missing, ["id", *ITEM_COLUMNS]), strict=True):
            half = reranker.encoder.encode_document(item_of(row), f"document {row['id']}")
            self._encoded.put((documents.path, number), half)
            halves[number] = half
        return [half for row in rows if (half := halves[row])]


class RerankerGroup(ActorGroup):
    """The reranking actors of a run: the same number and resources as the embedding actors."""

    def __init__(self, cluster: Cluster, compute: Compute, gpus: Gpus | None = None) -> None:
        super().__init__(RerankerActor, cluster, compute, "reranking", gpus)


def score_table(
    rerankers: RerankerGroup,
    candidates: pa.Table,
    queries: Queries,
    documents: StoredTable,
    out_dir: str | Path,
    ref: CheckpointRef,
    what: str = "queries",
) -> pa.Table:
    """Score every candidate of every query, resuming an interrupted attempt with the same inputs.

    Args:
        candidates: columns query, documents[] and scores[] (cosines), of SCORED; others are ignored. One row per query.
        ref: a reranker's checkpoint.

    Returns:
        Columns of SCORED in the order of `candidates`. A query is left out, and listed in `quarantine.parquet` with the
        reason, if it or one of its candidates cannot be used.

    Raises:
        UserError: no candidates, a checkpoint that is not a reranker, a full disk, or an actor that died too often.
    """
    candidates = candidates.select(["query", "documents", "scores"])
    if not candidates.num_rows:
        raise UserError(f"{what}: no candidates to score; mine or evaluate first")
    folder = Path(out_dir)
    inputs = {
        "checkpoint": ref.identity,
        "shard_rows": SHARD_QUERIES,
        "candidates": digest_of_table(candidates),
        "queries": queries.table.digest,
        "documents": documents.digest,
    }
    missing = open_output(folder, inputs, -(-candidates.num_rows // SHARD_QUERIES))

    def submit(actor: Any, index: int) -> ray.ObjectRef:
        shard = candidates.slice(index * SHARD_QUERIES, SHARD_QUERIES).combine_chunks()
        return actor.score_shard.remote(ref, shard, queries.table, documents, folder, index)

    if missing:
        left = sum(min(SHARD_QUERIES, candidates.num_rows - index * SHARD_QUERIES) for index in missing)
        with progress(candidates.num_rows, f"rerank {what}", "query") as bar:
            bar.update(candidates.num_rows - left)
            for done in rerankers.run(missing, submit):
                bar.update(done)
    close_output(folder, candidates.num_rows)
    return read_shards(folder)
