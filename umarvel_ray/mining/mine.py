"""Mining: find every training query's nearest documents and choose its hard negatives (docs/method.md#hard-negatives).

    mined = mine(embedders, dataset, recipe, ref, run / "embeddings" / "instruction", run / "mined")

1. Embed the training queries and the union of their pools with the instruction checkpoint.
2. Rank: the exact top `depth` documents of each query.
3. Judge every candidate (`mining/filters.py`).
4. Choose each query's negatives from the candidates that were kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from umarvel_ray.data.content import content_key, digest_of_table, own_pictures
from umarvel_ray.data.tables import Dataset
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.inference.shards import close_output, is_complete, open_output, read_shards, write_shard
from umarvel_ray.mining.filters import KEPT, SAME_CONTENT, TOO_SIMILAR, calibrate_threshold, choose_negatives, judge
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.recipe import Recipe
from umarvel_ray.retrieve.rank import Embedded, embed_split, rank

MINED = pa.schema(
    [
        ("query_id", pa.string()),
        ("task", pa.string()),
        ("document_ids", pa.list_(pa.string())),  # the exact top `depth`, positives included
        ("scores", pa.list_(pa.float32())),  # their cosines
        ("kept", pa.list_(pa.bool_())),  # passed the filters; the reranker's negatives are drawn from these
        ("negative_ids", pa.list_(pa.string())),  # the hard negatives of stage 2
    ]
)
CALIBRATION_SPLIT = "validation"

Row = dict[str, Any]  # of a documents or queries table


def mine(
    embedders: EmbedderGroup,
    dataset: Dataset,
    recipe: Recipe,
    ref: CheckpointRef,
    embeddings_dir: Path,
    out_dir: Path,
) -> pa.Table:
    """Mine candidates and negatives for the queries of stage 2, or read back what was mined from the same inputs.

    Embeds into `embeddings_dir` (`retrieve.rank.embed_split`), including the validation split if `max_similarity` is
    "calibrate". A query's own picture is never a candidate. The verdict counts are printed when mining runs, and stored
    in `out_dir/manifest.json`.

    Returns:
        Columns of MINED, in the order of the query table.

    Raises:
        UserError: a task without a training pool, an unreadable checkpoint, or a full disk.
    """
    split = recipe.stage2.train.queries
    queries = dataset.queries(split)
    inputs = {
        "checkpoint": ref.identity,
        "queries": digest_of_table(queries),
        "documents": digest_of_table(dataset.documents),
        "mining": recipe.stage2.mining.model_dump(),
        "negatives": recipe.stage2.train.hard_negatives,
        "seed": recipe.seed,
    }
    if not open_output(out_dir, inputs, shards=1) and is_complete(out_dir):
        return read_shards(out_dir)
    thresholds = _thresholds(embedders, dataset, recipe, ref, embeddings_dir)
    embedded = embed_split(embedders, dataset, split, ref, embeddings_dir)  # 1.
    ranking = rank(embedded, dataset, split, recipe.stage2.mining.pool, recipe.stage2.mining.depth)  # 2.
    mined, counts = _choose(ranking, embedded, dataset, recipe, thresholds)  # 3. and 4.
    done = {row["query_id"] for row in mined}
    missing = [id_ for id_ in queries["id"].to_pylist() if id_ not in done]
    reason = "not embedded, or its task has no pool; see the embeddings' quarantine.parquet"
    write_shard(out_dir, 0, pa.Table.from_pylist(mined, MINED), [(id_, reason) for id_ in missing])
    facts = {"max_similarity": thresholds, "candidates": {task: dict(c) for task, c in counts.items()}}
    print(_summary(close_output(out_dir, queries.num_rows, facts)))
    return read_shards(out_dir)


def _choose(
    ranking: pa.Table, embedded: Embedded, dataset: Dataset, recipe: Recipe, thresholds: dict[str, float]
) -> tuple[list[Row], dict[str, Counter[str]]]:
    """Judge every candidate (step 3) and choose every query's negatives (step 4).

    Returns:
        Rows of MINED in the order of the query table, and verdict counts by task.
    """
    mining, count, split = recipe.stage2.mining, recipe.stage2.train.hard_negatives, recipe.stage2.train.queries
    columns = [
        name for name in ("id", "text", "image", "concept", "modality") if name in dataset.documents.column_names
    ]
    documents = {row["id"]: _without_pixels(row) for row in dataset.documents.select(columns).to_pylist()}
    with_content, with_picture = defaultdict(list), defaultdict(list)
    for id_, document in documents.items():
        with_content[document["content"]].append(id_)
        with_picture[document["content"][1]].append(id_)
    queries = {row["id"]: row for row in dataset.queries(split).to_pylist()}
    positives = _positive_scores(embedded, queries) if mining.margin is not None else {}
    global_pool = dataset.global_pool(split)
    pools = {
        task: global_pool if mining.pool == "global" else dataset.pool(task, split) for task in dataset.tasks(split)
    }
    mined: list[Row] = []
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for number, row in enumerate(ranking.to_pylist()):
        query, ids = queries[row["query_id"]], row["document_ids"]
        gold = set(query["positive_ids"])
        gold_contents = {documents[id_]["content"] for id_ in gold}
        verdicts = judge(  # 3.
            ids,
            row["scores"],
            [documents[id_]["content"] for id_ in ids],
            gold,
            gold_contents,
            thresholds[row["task"]],
            mining.margin,
            positives.get(row["query_id"]),
        )
        counts[row["task"]].update(verdicts)
        for id_, verdict in zip(ids, verdicts, strict=True):
            if id_ not in gold and is_false_negative(query, documents[id_], [documents[g] for g in gold]):
                counts[row["task"]][f"false negative, {verdict}"] += 1
        kept = [verdict == KEPT for verdict in verdicts]
        # Not to be drawn at random either: rejected candidates, and documents that the ranking never contains.
        forbidden = gold.union(*(with_content[content] for content in gold_contents))
        forbidden.update(own_pictures(query, gold, with_picture))
        forbidden.update(id_ for id_, keep in zip(ids, kept, strict=True) if not keep)
        negatives = choose_negatives(  # 4.
            [id_ for id_, keep in zip(ids, kept, strict=True) if keep],
            count,
            mining.min_rank,
            (mining.random_mix_of or {}).get(row["task"], mining.random_mix),
            pools[row["task"]],
            forbidden,
            np.random.default_rng([recipe.seed, number]),
        )
        mined.append(
            {name: row[name] for name in ("query_id", "task", "document_ids", "scores")}
            | {"kept": kept, "negative_ids": negatives}
        )
    order = {id_: position for position, id_ in enumerate(queries)}
    return sorted(mined, key=lambda row: order[row["query_id"]]), counts


def is_false_negative(query: Row, document: Row, gold: list[Row]) -> bool:
    """Whether a document that is not listed as a positive answers the query, judged by the optional `concept` column.

    It does if it shows the query's concept in the modality of a positive. Not counted are queries that ask for a
    changed picture (image and text in, image out), because the unchanged concept does not answer them.
    """
    if query.get("concept") is None or document.get("concept") != query["concept"]:
        return False
    modalities = {row["modality"] for row in gold}
    asks_for_change = query["modality"] == "image,text" and modalities == {"image"}
    return document["modality"] in modalities and not asks_for_change


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
    ranking = rank(embedded, dataset, CALIBRATION_SPLIT, mining.pool, mining.depth)
    queries = {row["id"]: row for row in dataset.queries(CALIBRATION_SPLIT).select(["id", "positive_ids"]).to_pylist()}
    gold_scores: dict[str, list[float]] = defaultdict(list)
    other_scores: dict[str, list[float]] = defaultdict(list)
    for row in ranking.to_pylist():
        gold = set(queries[row["query_id"]]["positive_ids"])
        for id_, score in zip(row["document_ids"], row["scores"], strict=True):
            (gold_scores if id_ in gold else other_scores)[row["task"]].append(score)
    calibrated = {
        task: calibrate_threshold(np.array(gold_scores[task]), np.array(other_scores[task]))
        for task in set(ranking["task"].to_pylist())
    }
    return {task: calibrated.get(task, float(np.median(list(calibrated.values())))) for task in tasks}


def _positive_scores(embedded: Embedded, queries: dict[str, Row]) -> dict[str, float]:
    """Each query's cosine to its nearest positive."""
    search, vector_row = embedded.documents, embedded.queries.row_of()
    pairs = [
        (id_, vector_row[id_], search.row_of[gold])
        for id_, query in queries.items()
        if id_ in vector_row
        for gold in query["positive_ids"]
        if gold in search.row_of
    ]
    vector_rows, rows = np.array([pair[1] for pair in pairs]), np.array([pair[2] for pair in pairs])
    best: dict[str, float] = {}
    for (id_, _, _), score in zip(pairs, search.pair_scores(embedded.queries.vectors[vector_rows], rows), strict=True):
        best[id_] = max(float(score), best.get(id_, -1.0))
    return best


def _without_pixels(row: Row) -> Row:
    return {"content": content_key(row), "concept": row.get("concept"), "modality": row.get("modality")}


def _summary(manifest: dict[str, Any]) -> str:
    total: Counter[str] = sum((Counter(counts) for counts in manifest["candidates"].values()), Counter())
    false = {name.removeprefix("false negative, "): n for name, n in total.items() if name.startswith("false")}
    seen = sum(n for name, n in total.items() if not name.startswith("false"))
    shares = " · ".join(f"{name} {n / seen:.1%}" for name, n in total.items() if not name.startswith("false"))
    lines = [f"mined {manifest['written']:,} queries, {seen:,} candidates: {shares}"]
    if false:
        caught = false.get(SAME_CONTENT, 0) + false.get(TOO_SIMILAR, 0)
        share = caught / sum(false.values())
        lines.append(f"false negatives among them: {sum(false.values()):,}; {share:.1%} caught by the filters")
    return "\n".join(lines)
