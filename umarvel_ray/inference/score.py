"""Bulk reranking: P(yes) of each query's candidates, on a group of actors, resumable.

    with RerankerGroup(recipe.cluster, recipe.compute) as rerankers:
        scored = score_table(rerankers, candidates, queries, documents, run / "scores", ref)

`scored` is `candidates` with one more column, `rerank_scores`; it is fused with the cosines where both are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import torch
from cachetools import LRUCache

from umarvel_ray.data.content import content_key, digest_of_table
from umarvel_ray.data.tables import item_of
from umarvel_ray.errors import UserError
from umarvel_ray.inference.actors import ActorGroup
from umarvel_ray.inference.shards import close_output, open_output, read_shards, write_shard
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.progress import progress
from umarvel_ray.recipe import Cluster, Compute

if TYPE_CHECKING:
    from umarvel_ray.items.pair_encoder import EncodedPair
    from umarvel_ray.model.reranker import Reranker

SHARD_QUERIES = 64
ENCODED_DOCUMENTS = 2048  # kept per actor: neighbouring queries share many candidates
SCORED = pa.schema(
    [
        ("query_id", pa.string()),
        ("document_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("rerank_scores", pa.list_(pa.float32())),
    ]
)


@ray.remote
class RerankerActor:
    """One device."""

    def __init__(self, compute: Compute, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device, self._compute = device, compute
        self._loaded: CheckpointRef | None = None
        self._reranker: Reranker | None = None
        self._encoded: LRUCache[tuple, EncodedPair] = LRUCache(ENCODED_DOCUMENTS)

    def score_shard(
        self, ref: CheckpointRef, candidates: pa.Table, queries: pa.Table, documents: pa.Table, folder: Path, index: int
    ) -> int:
        """Score and write one shard; returns the number of queries done."""
        reranker = self._load(ref)
        query_of = {row["id"]: row for row in queries.to_pylist()}
        document_of = {row["id"]: row for row in documents.to_pylist()}
        done, quarantined = [], []
        for row in candidates.to_pylist():
            try:
                item = item_of(query_of[row["query_id"]])
                query = reranker.encoder.encode_query(item, f"query {row['query_id']}")
                halves = [self._document(document_of[id_]) for id_ in row["document_ids"]]
                scores = reranker.score_encoded(query, halves, self._compute.token_budget)
                done.append(row | {"rerank_scores": scores.tolist()})
            except UserError as error:
                quarantined.append((row["query_id"], str(error)))
        write_shard(folder, index, pa.Table.from_pylist(done, schema=SCORED), quarantined)
        return candidates.num_rows

    def _load(self, ref: CheckpointRef) -> Reranker:
        from umarvel_ray.model.reranker import Reranker  # the driver does without the model

        if ref != self._loaded:
            self._encoded.clear()
            self._reranker = Reranker.from_pretrained(ref.path, self._device, self._compute.dtype)
            self._loaded = ref
        return self._reranker

    def _document(self, row: dict) -> EncodedPair:
        key = content_key(row)
        if key not in self._encoded:
            self._encoded[key] = self._reranker.encoder.encode_document(item_of(row), f"document {row['id']}")
        return self._encoded[key]


class RerankerGroup(ActorGroup):
    """The reranking actors of a run, as many and as large as the embedders."""

    def __init__(self, cluster: Cluster, compute: Compute) -> None:
        super().__init__(RerankerActor, cluster, compute, "reranking")


def score_table(
    rerankers: RerankerGroup,
    candidates: pa.Table,
    queries: pa.Table,
    documents: pa.Table,
    out_dir: str | Path,
    ref: CheckpointRef,
    what: str = "queries",
) -> pa.Table:
    """Score every candidate of every query, or finish an earlier attempt at exactly that.

    Args:
        candidates: query_id, document_ids[], scores[] (cosines); other columns are ignored. Each query once.
        queries, documents: the tables those ids are found in.
        ref: a reranker's checkpoint.

    Returns:
        query_id, document_ids[], scores[], rerank_scores[] in the order of `candidates`. A query with an item that
        cannot be used is left out and listed in `quarantine.parquet` with the reason.

    Raises:
        UserError: no candidates, an id that is in no table, not a reranker, disk full, an actor died too often.
    """
    candidates = candidates.select(["query_id", "document_ids", "scores"])
    if not candidates.num_rows:
        raise UserError(f"{what}: no candidates to score; mine or evaluate first")
    folder = Path(out_dir)
    query_row, document_row = _row_of(queries), _row_of(documents)
    inputs = {"checkpoint": ref.identity, "shard_rows": SHARD_QUERIES}
    for name, table in (("candidates", candidates), ("queries", queries), ("documents", documents)):
        inputs[name] = digest_of_table(table)
    missing = open_output(folder, inputs, -(-candidates.num_rows // SHARD_QUERIES))

    def submit(actor: Any, index: int) -> ray.ObjectRef:
        some = candidates.slice(index * SHARD_QUERIES, SHARD_QUERIES)
        wanted = dict.fromkeys(id_ for ids in some["document_ids"].to_pylist() for id_ in ids)
        return actor.score_shard.remote(
            ref,
            some,
            queries.take(_find(query_row, some["query_id"].to_pylist(), "query")),
            documents.take(_find(document_row, wanted, "document")),
            folder,
            index,
        )

    if missing:
        left = sum(min(SHARD_QUERIES, candidates.num_rows - index * SHARD_QUERIES) for index in missing)
        with progress(candidates.num_rows, f"rerank {what}", "query") as bar:
            bar.update(candidates.num_rows - left)
            for done in rerankers.run(missing, submit):
                bar.update(done)
    close_output(folder, candidates.num_rows)
    return read_shards(folder)


def _row_of(table: pa.Table) -> dict[str, int]:
    return {id_: row for row, id_ in enumerate(table["id"].to_pylist())}


def _find(row_of: dict[str, int], ids, kind: str) -> pa.Array:
    unknown = next((id_ for id_ in ids if id_ not in row_of), None)
    if unknown is not None:
        raise UserError(f"candidates name the {kind} '{unknown}', which is in no table; mine again")
    return pa.array([row_of[id_] for id_ in ids], pa.int64())
