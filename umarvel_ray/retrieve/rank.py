"""Rankings: exact search of each query in its task's pool (local) or in the union of all pools (global).

Mining and evaluation share this code, so mining sees exactly what would be retrieved. A ranking is made shard by shard,
one for each shard of embedded queries, so that its size is bounded by the disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from umarvel_ray.data.content import NO_PICTURE
from umarvel_ray.data.dataset import Dataset, Queries, Selection
from umarvel_ray.inference.embed import EmbedderGroup, embed_table
from umarvel_ray.inference.embeddings import vectors_of
from umarvel_ray.inference.shards import (
    Quarantined,
    close_output,
    is_complete,
    open_output,
    read_manifest,
    read_shard,
    read_shards,
    write_shard,
)
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.ragged import Ragged, RowsByKey, find
from umarvel_ray.retrieve.exact import ExactSearch
from umarvel_ray.retrieve.topk import TopK

RANKING = pa.schema(
    [
        ("query", pa.int64()),  # row number in the query table
        ("task", pa.string()),
        ("documents", pa.large_list(pa.int64())),  # row numbers in the document table, best first
        ("scores", pa.large_list(pa.float32())),
        ("pool_size", pa.int64()),
    ]
)
AHEAD = 2  # shards whose search is started before the first one is done
NO_RANKING = "not embedded; see the embeddings' quarantine.parquet"

Scope = Literal["local", "global"]


class Embedded(NamedTuple):
    """One split embedded by one checkpoint: the documents of its pools, searchable, and the folder of its queries."""

    documents: ExactSearch
    queries: Path


def embed_split(
    embedders: EmbedderGroup,
    dataset: Dataset,
    split: str,
    ref: CheckpointRef,
    folder: Path,
) -> Embedded:
    """Embed the queries of a split, task by task, and the union of its pools, resuming an interrupted attempt.

    Writes `folder/SPLIT-queries` and `folder/SPLIT-documents`.

    Raises:
        UserError: see `embed_table`; a task without a pool, or an empty pool.
    """
    dataset.check_pools(split)
    documents_dir, queries_dir = folder / f"{split}-documents", folder / f"{split}-queries"
    pool = Selection(dataset.documents, dataset.global_pool(split))
    embed_table(embedders, pool, "document", documents_dir, ref, f"{split} documents")
    embed_table(embedders, dataset.queries(split).by_task(), "query", queries_dir, ref, f"{split} queries")
    return Embedded(ExactSearch(embedders, documents_dir), queries_dir)


def rank(
    embedded: Embedded,
    dataset: Dataset,
    split: str,
    scope: Scope,
    depth: int,
    folder: Path,
    drop_query_image: bool = True,
) -> pa.Table:
    """The `depth` nearest documents of every embedded query of the split; written to `folder` in resumable shards.

    Locally, a query with a gallery is ranked against that alone, with equal scores in favor of other documents than its
    positives: a model that cannot tell two documents apart has not found the right one.

    Args:
        drop_query_image: remove documents that show the query's own picture from its pool, unless they are its
            positives (docs/method.md#query-image-in-pool).

    Returns:
        Columns of RANKING, one row per query, in the order of the query shards. Documents come best first, `scores` are
        cosines, and `pool_size` is the number of documents that the query was ranked against.
    """
    queries, asked = dataset.queries(split), read_manifest(embedded.queries)
    inputs = {
        "queries": queries.digest,
        "pools": dataset.digest_of_pools(split),
        "embedded": [read_manifest(embedded.documents.folder)["inputs"], asked["inputs"]],
        "scope": scope,
        "depth": depth,
        "drop": drop_query_image,
    }
    missing = open_output(folder, inputs, asked["shards"])
    if missing or not is_complete(folder):
        for index, ranking, lost in rank_shards(embedded, dataset, split, scope, depth, missing, drop_query_image):
            write_shard(folder, index, ranking, lost)
        close_output(folder, queries.n)
    return read_ranking(folder)


def read_ranking(folder: Path) -> pa.Table:
    """What `rank` wrote."""
    return read_shards(folder)


def write_ranking(folder: Path, ranking: pa.Table) -> None:
    """Write a ranking that was computed in memory, for `read_ranking`."""
    open_output(folder, {"rows": ranking.num_rows}, 1)
    write_shard(folder, 0, ranking, [])
    close_output(folder, ranking.num_rows)


def rank_shards(
    embedded: Embedded,
    dataset: Dataset,
    split: str,
    scope: Scope,
    depth: int,
    shards: Iterable[int],
    drop_query_image: bool = True,
) -> Iterator[tuple[int, pa.Table, Quarantined]]:
    """Rank the queries of some shards: (number, columns of RANKING, the shard's queries that have no ranking).

    The next shards are searched while the caller works on one. See `rank`.
    """
    ranker = _Ranker(embedded, dataset, split, scope, depth, drop_query_image)
    waiting: deque[tuple[int, Callable[[], tuple[pa.Table, Quarantined]]]] = deque()
    for index in shards:
        waiting.append((index, ranker.start(index)))
        if len(waiting) > AHEAD:
            number, wait = waiting.popleft()
            yield number, *wait()
    for number, wait in waiting:
        yield number, *wait()


class OwnPictures:
    """Which documents show a query's own picture, or some of several, but are not its positives: trivial matches.

    Args:
        documents: int64 (m,), rows of the documents to look among.
    """

    def __init__(self, dataset: Dataset, queries: Queries, documents: np.ndarray) -> None:
        self._positives = queries.positives
        self._asked = _pictures_of(queries)
        keys = dataset.documents.column("picture_key").to_numpy()[documents]
        shown = keys != NO_PICTURE
        self._shown = RowsByKey(keys[shown], documents[shown])

    def of(self, at: np.ndarray) -> Ragged:
        """The documents of the queries at these positions."""
        asked = self._asked.take(at)
        of_each = self._shown.having(asked.values.view(np.uint64))
        owners = asked.owners[of_each.owners]
        shown = Ragged.of_counts(np.bincount(owners, minlength=asked.n), of_each.values)
        return shown.keep(~self._positives.take(at).contains_pairs(shown.owners, shown.values))


class _Ranker:
    """Everything that is the same for all shards."""

    def __init__(
        self, embedded: Embedded, dataset: Dataset, split: str, scope: Scope, depth: int, drop_query_image: bool
    ) -> None:
        self._search, self._folder = embedded
        self._dataset, self._split, self._scope, self._depth = dataset, split, scope, depth
        self._queries = dataset.queries(split)
        self._by_task, self._shard_rows = self._queries.by_task(), read_manifest(self._folder)["inputs"]["shard_rows"]
        self._shared: dict[str, tuple[ray.ObjectRef[Any] | None, np.ndarray]] = {}
        shown = self._search.rows if drop_query_image else self._search.rows[:0]
        self._own = OwnPictures(dataset, self._queries, shown)

    def start(self, index: int) -> Callable[[], tuple[pa.Table, Quarantined]]:
        """Start the search for the queries of a shard."""
        shard = read_shard(self._folder, index)
        rows, vectors = shard["row"].to_numpy(), vectors_of(shard)
        at = np.searchsorted(self._queries.rows, rows)
        started = []
        for code in np.unique(self._queries.task[at]):
            task = self._queries.tasks[code]
            inside = np.flatnonzero(self._queries.task[at] == code)
            if self._scope == "local" and self._queries.galleries:
                started.append((task, rows[inside], *self._gallery(at[inside], vectors[inside])))
                continue
            pool, members = self._pool(task)
            exclude = self._own.of(at[inside])
            search = self._search.topk(vectors[inside], self._depth, pool, exclude)
            sizes = len(members) - _count_inside(exclude, members)
            started.append((task, rows[inside], sizes, search))

        def wait() -> tuple[pa.Table, Quarantined]:
            tables = [_ranking(task, own, sizes, search()) for task, own, sizes, search in started]
            ranking = pa.concat_tables([RANKING.empty_table(), *tables])
            return ranking, self._lost(index, ranking)

        return wait

    def _gallery(self, at: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, Callable[[], TopK]]:
        """The sizes of some queries' galleries, and the search in them."""
        assert self._queries.galleries is not None
        given = self._queries.galleries.take(at)
        positions, known = find(self._search.rows, given.values)
        lists = Ragged(given.offsets, positions).keep(known)
        documents = Ragged(lists.offsets, self._search.rows[lists.values])
        search = self._search.list_scores(vectors, lists)
        relevant = self._queries.positives.take(at).contains_pairs(documents.owners, documents.values)
        return lists.counts, lambda: best_of_lists(documents, search(), relevant, self._depth)

    def _pool(self, task: str) -> tuple[ray.ObjectRef[Any] | None, np.ndarray]:
        """What a task is searched in, and its members as ascending rows of documents."""
        name = task if self._scope == "local" else ""
        if name not in self._shared:
            if self._scope == "global":
                self._shared[name] = None, self._search.rows
            else:
                positions = self._search.positions(self._dataset.pool(task, self._split))
                self._shared[name] = ray.put(positions), self._search.rows[positions]
        return self._shared[name]

    def _lost(self, index: int, ranking: pa.Table) -> Quarantined:
        asked = self._by_task.part(index * self._shard_rows, (index + 1) * self._shard_rows).rows
        lost = asked[~np.isin(asked, ranking["query"].to_numpy())]
        return [(id_, NO_RANKING) for id_ in self._queries.table.ids(lost)]


def best_of_lists(documents: Ragged, scores: np.ndarray, relevant: np.ndarray, k: int) -> TopK:
    """The k best documents of each list; of equal scores, those that are not relevant come first.

    Args:
        scores, relevant: (m,), aligned with the documents.
    """
    order = np.lexsort((relevant, -scores, documents.owners))
    ranks = np.arange(len(order)) - np.repeat(documents.offsets[:-1], documents.counts)
    head = order[ranks < k]
    best, rows = np.full((documents.n, k), -np.inf, np.float32), np.full((documents.n, k), -1, np.int64)
    place = documents.owners[head], ranks[ranks < k]
    best[place], rows[place] = scores[head], documents.values[head]
    return best, rows


def _pictures_of(queries: Queries) -> Ragged:
    """Keys of the pictures that each query shows."""
    if "picture_keys" in queries.table.schema.names:
        return Ragged.of_arrow(queries.table.column("picture_keys")).take(queries.rows)
    keys = queries.table.column("picture_key").to_numpy()[queries.rows]
    return Ragged.of_counts(np.ones(queries.n, np.int64), keys.view(np.int64))


def _count_inside(lists: Ragged, members: np.ndarray) -> np.ndarray:
    """How many values of each list are among ascending `members`."""
    return lists.keep(find(members, lists.values)[1]).counts


def _ranking(task: str, queries: np.ndarray, pool_sizes: np.ndarray, found: TopK) -> pa.Table:
    scores, rows = found
    valid = rows >= 0
    documents = Ragged.of_counts(valid.sum(1), rows[valid])
    tasks = pa.array([task] * len(queries), pa.string())
    return pa.table([queries, tasks, documents.to_arrow(), documents.like(scores[valid]), pool_sizes], schema=RANKING)
