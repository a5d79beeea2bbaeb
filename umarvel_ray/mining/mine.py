"""Mining: find every training query's nearest documents and choose its hard negatives (docs/method.md#hard-negatives).

    mine(embedders, dataset, recipe, ref, run / "embeddings" / "instruction", run / "mined" / "instruction")

1. Embed the training queries and the union of their pools with the instruction checkpoint.
2. Rank: the exact top `depth` documents of each query.
3. Judge every candidate (`mining/filters.py`).
4. Choose each query's negatives from the candidates that were kept.

Steps 2 to 4 go through the queries shard by shard; each shard is written when it is done.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.data.content import digest_of
from umarvel_ray.data.dataset import Dataset, Queries
from umarvel_ray.errors import UserError
from umarvel_ray.inference.embed import EmbedderGroup, rows_per_shard
from umarvel_ray.inference.embeddings import vectors_of
from umarvel_ray.inference.shards import (
    close_output,
    is_complete,
    open_output,
    read_manifest,
    read_shard,
    shard_facts,
    write_shard,
)
from umarvel_ray.mining.documents import Documents
from umarvel_ray.mining.filters import (
    GOLD,
    KEPT,
    SAME_CONTENT,
    TOO_SIMILAR,
    VERDICTS,
    best_kept,
    calibrate_threshold,
    ceilings,
    fill_at_random,
    judge,
)
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.ragged import Ragged, find, flat
from umarvel_ray.recipe import Recipe
from umarvel_ray.retrieve.rank import Embedded, OwnPictures, embed_split, rank, rank_shards

MINED = pa.schema(
    [
        ("query", pa.int64()),  # row number in the query table
        ("task", pa.string()),
        ("documents", pa.large_list(pa.int64())),  # the exact top `depth`, positives included
        ("scores", pa.large_list(pa.float32())),  # their cosines
        ("kept", pa.large_list(pa.bool_())),  # passed the filters; the reranker's negatives are drawn from these
        ("negatives", pa.large_list(pa.int64())),  # the hard negatives of stage 2
        ("easy", pa.large_list(pa.int64())),  # documents drawn at random from the pool, if the reranker learns from any
    ]
)
EASY = 16  # documents drawn per query
CALIBRATION_SPLIT = "validation"
FALSE = "false negative, "

Counts = dict[str, Counter[str]]  # verdicts by task


def mine(
    embedders: EmbedderGroup,
    dataset: Dataset,
    recipe: Recipe,
    ref: CheckpointRef,
    embeddings_dir: Path,
    out_dir: Path,
) -> None:
    """Mine candidates and negatives for the queries of stage 2 into `out_dir`, in resumable shards of MINED.

    Embeds into `embeddings_dir` (`retrieve.rank.embed_split`), including the validation split if `max_similarity` is
    "calibrate". A query's own picture is never a candidate. The verdict counts are printed when mining ends, and stored
    in `out_dir/manifest.json`.

    Raises:
        UserError: a task without a training pool, an unreadable checkpoint, or a full disk.
    """
    split, mining = recipe.stage2.train.queries, recipe.stage2.mining
    queries = dataset.queries(split)
    calibrated = None
    if mining.max_similarity == "calibrate":
        digests = dataset.queries(CALIBRATION_SPLIT).digest, dataset.digest_of_pools(CALIBRATION_SPLIT)
        calibrated = digest_of(*digests)
    inputs = {
        "checkpoint": ref.identity,
        "queries": queries.digest,
        "documents": dataset.documents.digest,
        "pools": dataset.digest_of_pools(split),
        "calibrated on": calibrated,
        "mining": mining.model_dump(),
        "negatives": recipe.stage2.train.hard_negatives,
        "easy": _easy_count(recipe),
        "seed": recipe.seed,
    }
    shards = -(-queries.n // rows_per_shard(queries.n))
    missing = open_output(out_dir, inputs, shards)
    if not missing and is_complete(out_dir):
        return
    thresholds = _thresholds(embedders, dataset, recipe, ref, embeddings_dir)
    embedded = embed_split(embedders, dataset, split, ref, embeddings_dir)  # 1.
    judge_shard = CandidateJudge(embedded, dataset, recipe, thresholds)
    for index, ranking, lost in rank_shards(embedded, dataset, split, mining.pool, mining.depth, missing):  # 2.
        mined, counts = judge_shard(index, ranking)  # 3. and 4.
        write_shard(out_dir, index, mined, lost, counts)
    total = _total(shard_facts(out_dir, index) for index in range(shards))
    facts = {"max_similarity": thresholds, "candidates": total}
    print(_summary(close_output(out_dir, queries.n, facts)))


def negatives_of(out_dir: Path, queries: Queries) -> Ragged:
    """The hard negatives of each query; none for a query that was not mined."""
    return _aligned(out_dir, queries, ("negatives",), lambda shard: Ragged.of_arrow(shard["negatives"]))


def easy_of(out_dir: Path, queries: Queries) -> Ragged:
    """Documents drawn at random from the pool of each query; none for a query that was not mined."""
    return _aligned(out_dir, queries, ("easy",), lambda shard: Ragged.of_arrow(shard["easy"]))


def kept_of(out_dir: Path, queries: Queries, first: int, last: int) -> Ragged:
    """Of each query's candidates that passed the filters those at ranks `first` to before `last`, best first.

    None for a query that was not mined.
    """

    def kept(shard: pa.Table) -> Ragged:
        return best_kept(Ragged.of_arrow(shard["documents"]), flat(shard["kept"]), first, last)

    return _aligned(out_dir, queries, ("documents", "kept"), kept)


def candidates_of(out_dir: Path, rows: np.ndarray, top: int) -> pa.Table:
    """The first `top` candidates of some queries that were mined, positives included, and their cosines.

    Args:
        rows: row numbers of the queries.

    Returns:
        Columns query, documents and scores of MINED.
    """
    tables = []
    for index in range(read_manifest(out_dir)["shards"]):
        shard = read_shard(out_dir, index, ["query", "documents", "scores"])
        tables.append(shard.filter(pc.is_in(shard["query"], value_set=pa.array(rows))))
    found = pa.concat_tables(tables)
    for name in ("documents", "scores"):
        found = found.set_column(found.schema.get_field_index(name), name, pc.list_slice(found[name], 0, top))
    return found.cast(pa.schema([MINED.field(name) for name in found.schema.names]))


def _aligned(out_dir: Path, queries: Queries, columns: Sequence[str], lists_of: Callable[[pa.Table], Ragged]) -> Ragged:
    """Lists made of some columns of all shards, in the order of the queries."""
    parts: deque[tuple[np.ndarray, Ragged]] = deque()
    for index in range(read_manifest(out_dir)["shards"]):
        shard = read_shard(out_dir, index, ["query", *columns])
        parts.append((np.searchsorted(queries.rows, shard["query"].to_numpy()), lists_of(shard)))
    return Ragged.gathered(parts, queries.n)


class CandidateJudge:
    """Judges the candidates of a shard's queries and chooses their negatives."""

    def __init__(self, embedded: Embedded, dataset: Dataset, recipe: Recipe, thresholds: dict[str, float]) -> None:
        split = recipe.stage2.train.queries
        self._embedded, self._recipe, self._thresholds = embedded, recipe, thresholds
        self._queries = dataset.queries(split)
        self._documents = Documents(dataset, self._queries)
        found = embedded.documents.rows
        self._own = OwnPictures(dataset, self._queries, found)
        # Only documents that could be embedded may be drawn: the others cannot be trained on either.
        pools = dict.fromkeys(dataset.tasks(split), found)
        if recipe.stage2.mining.pool == "local":
            pools = {task: found[embedded.documents.positions(dataset.pool(task, split))] for task in pools}
        self._pools = pools

    def __call__(self, index: int, ranking: pa.Table) -> tuple[pa.Table, Counts]:
        """Columns of MINED, and verdict counts by task, for the ranked queries of a shard."""
        mining = self._recipe.stage2.mining
        tasks = np.array(ranking["task"].to_pylist(), dtype=object)
        at = np.searchsorted(self._queries.rows, ranking["query"].to_numpy())
        candidates = Ragged.of_arrow(ranking["documents"])
        scores = flat(ranking["scores"])
        positives = self._queries.positives.take(at)
        limits = np.array([self._thresholds[task] for task in tasks])
        nearest = None if mining.margin is None else self._positive_scores(index, at, positives)
        ceiling = ceilings(limits, mining.margin, nearest)
        verdicts = judge(candidates, scores, positives, self._documents.content, ceiling)  # 3.
        false = self._documents.false_negatives(candidates, at, positives)
        kept = verdicts == VERDICTS.index(KEPT)
        negatives = self._choose(at, tasks, candidates, kept, positives)  # 4.
        easy = self._easy(at, tasks, candidates.keep(~kept), positives)
        columns = [
            ranking["query"].combine_chunks(),
            ranking["task"].combine_chunks(),
            candidates.to_arrow(),
            candidates.like(scores),
            candidates.like(kept),
            negatives.to_arrow(),
            easy.to_arrow(),
        ]
        return pa.table(columns, schema=MINED), _counts(tasks[candidates.owners], verdicts, false)

    def _choose(
        self, at: np.ndarray, tasks: np.ndarray, candidates: Ragged, kept: np.ndarray, positives: Ragged
    ) -> Ragged:
        """Each query's best kept candidates from `min_rank` on, and a share drawn at random from its pool."""
        mining, count, seed = self._recipe.stage2.mining, self._recipe.stage2.train.hard_negatives, self._recipe.seed
        mixes = {task: (mining.random_mix_of or {}).get(task, mining.random_mix) for task in self._pools}
        hard = np.array([count - round(count * mixes[task]) for task in tasks], np.int64)
        chosen = best_kept(candidates, kept, mining.min_rank, mining.min_rank + hard)
        short = np.flatnonzero(chosen.counts < count)
        if not len(short):
            return chosen
        lists = [own.tolist() for own in chosen.lists()]
        forbidden = self._forbidden(at[short], candidates.keep(~kept).take(short), positives.take(short))
        for query, never in zip(short.tolist(), forbidden, strict=True):
            rng = np.random.default_rng([seed, int(self._queries.rows[at[query]])])
            lists[query] = fill_at_random(chosen.at(query), count, self._pools[tasks[query]], never, rng)
        return Ragged.of(lists)

    def _easy(self, at: np.ndarray, tasks: np.ndarray, rejected: Ragged, positives: Ragged) -> Ragged:
        """Each query's documents drawn at random from its pool."""
        count, none = _easy_count(self._recipe), np.empty(0, np.int64)
        if not count:
            return Ragged.of([()] * len(at))
        lists = []
        for query, never in enumerate(self._forbidden(at, rejected, positives)):
            rng = np.random.default_rng([self._recipe.seed, int(self._queries.rows[at[query]]), EASY])
            lists.append(fill_at_random(none, count, self._pools[tasks[query]], never, rng))
        return Ragged.of(lists)

    def _forbidden(self, at: np.ndarray, rejected: Ragged, positives: Ragged) -> Iterator[set[int]]:
        """What must not be drawn for each query: rejected candidates, and documents that its ranking never contains."""
        own = self._own.of(at)
        for number, twins in enumerate(self._documents.twins(positives)):
            yield {*rejected.at(number).tolist(), *twins, *own.at(number).tolist()}

    def _positive_scores(self, index: int, at: np.ndarray, positives: Ragged) -> np.ndarray:
        """Each query's cosine to its nearest positive that was embedded; NaN if none was."""
        shard = read_shard(self._embedded.queries, index)
        rows = shard["row"].to_numpy()  # task by task
        order = np.argsort(rows)
        vectors = vectors_of(shard)[order[np.searchsorted(rows, self._queries.rows[at], sorter=order)]]
        known = positives.keep(find(self._embedded.documents.rows, positives.values)[1])
        scores = self._embedded.documents.pair_scores(vectors[known.owners], known.values)
        best = np.full(len(at), np.nan)
        np.fmax.at(best, known.owners, scores)
        return best


def _easy_count(recipe: Recipe) -> int:
    phase = recipe.reranker.train
    return max(EASY, phase.negatives) if phase.easy_steps or phase.random_mix else 0


def _thresholds(
    embedders: EmbedderGroup, dataset: Dataset, recipe: Recipe, ref: CheckpointRef, embeddings_dir: Path
) -> dict[str, float]:
    """The largest cosine a negative may have, by task: fixed, or calibrated on the task's validation queries.

    Thresholds are per task because cosines are not comparable across modalities. A task without validation queries gets
    the median of the others.
    """
    mining, tasks = recipe.stage2.mining, dataset.tasks(recipe.stage2.train.queries)
    if mining.max_similarity != "calibrate":
        return dict.fromkeys(tasks, mining.max_similarity)
    embedded = embed_split(embedders, dataset, CALIBRATION_SPLIT, ref, embeddings_dir)
    folder = embeddings_dir / f"{CALIBRATION_SPLIT}-ranking"
    ranking = rank(embedded, dataset, CALIBRATION_SPLIT, mining.pool, mining.depth, folder)
    queries = dataset.queries(CALIBRATION_SPLIT)
    candidates = Ragged.of_arrow(ranking["documents"])
    scores = flat(ranking["scores"])
    at = np.searchsorted(queries.rows, ranking["query"].to_numpy())
    gold = queries.positives.take(at).contains_pairs(candidates.owners, candidates.values)
    task = queries.task[at][candidates.owners]
    calibrated = {
        queries.tasks[code]: calibrate_threshold(scores[(task == code) & gold], scores[(task == code) & ~gold])
        for code in np.unique(task)
    }
    if not calibrated:
        raise UserError(
            f"{dataset.root}: no '{CALIBRATION_SPLIT}' query could be embedded, so that max_similarity cannot be "
            f"calibrated; see {embedded.queries / 'quarantine.parquet'}, or give stage2.mining.max_similarity a number"
        )
    return {task: calibrated.get(task, float(np.median(list(calibrated.values())))) for task in tasks}


def _counts(tasks: np.ndarray, verdicts: np.ndarray, false: np.ndarray) -> Counts:
    """How often each verdict was given in each task, and to how many false negatives."""
    counts: Counts = {}
    for task in np.unique(tasks):
        own = tasks == task
        found = {name: int(((verdicts == code) & own).sum()) for code, name in enumerate(VERDICTS)}
        wrong = {
            FALSE + name: int(((verdicts == code) & own & false).sum())
            for code, name in enumerate(VERDICTS)
            if name != GOLD
        }
        counts[task] = Counter({name: count for name, count in {**found, **wrong}.items() if count})
    return counts


def _total(parts: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    total: Counts = {}
    for counts in parts:
        for task, own in counts.items():
            total.setdefault(task, Counter()).update(own)
    return {task: dict(counts) for task, counts in total.items()}


def _summary(manifest: dict[str, Any]) -> str:
    total: Counter[str] = sum((Counter(counts) for counts in manifest["candidates"].values()), Counter())
    false = {name.removeprefix(FALSE): n for name, n in total.items() if name.startswith(FALSE)}
    given = {name: n for name, n in total.items() if not name.startswith(FALSE)}
    seen = sum(given.values())
    shares = " · ".join(f"{name} {n / seen:.1%}" for name, n in given.items())
    lines = [f"mined {manifest['written']:,} queries, {seen:,} candidates: {shares}"]
    if false:
        caught = false.get(SAME_CONTENT, 0) + false.get(TOO_SIMILAR, 0)
        share = caught / sum(false.values())
        lines.append(f"false negatives among them: {sum(false.values()):,}; {share:.1%} caught by the filters")
    return "\n".join(lines)
