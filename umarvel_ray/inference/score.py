"""Bulk reranking: score each query's candidates with P(yes) on a group of actors; resumable.

    with RerankerGroup(recipe.cluster, recipe.compute) as rerankers:
        scored = score_table(rerankers, candidates, queries, documents, run / "scores", ref)

`scored` is `candidates` with one more column, `rerank_scores`. Callers fuse it with the cosines.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
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
ENCODED_DOCUMENTS = 2048  # cached per actor: neighboring queries share many candidates
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
    """Scores shards on one device."""

    def __init__(self, compute: Compute, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device, self._compute = device, compute
        self._loaded: tuple[CheckpointRef, Reranker] | None = None
        self._encoded: LRUCache[Hashable, EncodedPair] = LRUCache(ENCODED_DOCUMENTS)

    def score_shard(
        self, ref: CheckpointRef, candidates: pa.Table, queries: pa.Table, documents: pa.Table, folder: Path, index: int
    ) -> int:
        """Score and write one shard; returns the number of input queries."""
        reranker = self._load(ref)
        query_of = {row["id"]: row for row in queries.to_pylist()}
        document_of = {row["id"]: row for row in documents.to_pylist()}
        done, quarantined = [], []
        for row in candidates.to_pylist():
            try:
                item = item_of(query_of[row["query_id"]])
                query = reranker.encoder.encode_query(item, f"query {row['query_id']}")
                candidate_halves = [self._document(reranker, document_of[id_]) for id_ in row["document_ids"]]
                scores = reranker.score_encoded(query, candidate_halves, self._compute.token_budget)
                done.append(row | {"rerank_scores": scores.tolist()})
            except UserError as error:
                quarantined.append((row["query_id"], str(error)))
        write_shard(folder, index, pa.Table.from_pylist(done, schema=SCORED), quarantined)
        return candidates.num_rows

    def _load(self, ref: CheckpointRef) -> Reranker:
        from umarvel_ray.model.reranker import Reranker  # keeps the model code out of the driver

        if self._loaded is None or self._loaded[0] != ref:
            self._encoded.clear()
            self._loaded = ref, Reranker.from_pretrained(ref.path, self._device, self._compute.dtype)
        return self._loaded[1]

    def _document(self, reranker: Reranker, row: dict[str, Any]) -> EncodedPair:
        key = content_key(row)
        if key not in self._encoded:
            self._encoded[key] = reranker.encoder.encode_document(item_of(row), f"document {row['id']}")
        return self._encoded[key]


class RerankerGroup(ActorGroup):
    """The reranking actors of a run: the same number and resources as the embedding actors."""

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
    """Score every candidate of every query, resuming an interrupted attempt with the same inputs.

    Args:
        candidates: columns query_id, document_ids[], scores[] (cosines); others are ignored. One row per query.
        queries, documents: the tables that contain these ids.
        ref: a reranker's checkpoint.

    Returns:
        query_id, document_ids[], scores[], rerank_scores[] in the order of `candidates`. A query is left out, and
        listed in `quarantine.parquet` with the reason, if it or one of its candidates cannot be used.

    Raises:
        UserError: no candidates, an id missing from the tables, a checkpoint that is not a reranker, a full disk, or an
            actor that died too often.
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
        shard = candidates.slice(index * SHARD_QUERIES, SHARD_QUERIES)
        document_ids = dict.fromkeys(id_ for ids in shard["document_ids"].to_pylist() for id_ in ids)
        return actor.score_shard.remote(
            ref,
            shard,
            queries.take(_find(query_row, shard["query_id"].to_pylist(), "query")),
            documents.take(_find(document_row, document_ids, "document")),
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


def _find(row_of: dict[str, int], ids: Collection[str], kind: str) -> pa.Array:
    unknown = next((id_ for id_ in ids if id_ not in row_of), None)
    if unknown is not None:
        raise UserError(f"candidates refer to the {kind} '{unknown}', which is not in its table; mine again")
    return pa.array([row_of[id_] for id_ in ids], pa.int64())
