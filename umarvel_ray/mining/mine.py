"""Mining: for every training query its nearest documents, and which of them may serve as negatives (method section 3).

    mined = mine(embedders, dataset, recipe, ref, run / "embeddings" / "instruction", run / "mined")

One row per query: `query_id, task, document_ids[], scores[]` (the exact top `depth`, gold included, cosines: what the
teacher scores), `kept[]` (true where a candidate passed the filters: what the reranker's negatives are drawn from) and
`negative_ids[]` (the hard negatives of stage 2, ready to use).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

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
        ("document_ids", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
        ("kept", pa.list_(pa.bool_())),
        ("negative_ids", pa.list_(pa.string())),
    ]
)
CALIBRATION_SPLIT = "validation"


def mine(
    embedders: EmbedderGroup,
    dataset: Dataset,
    recipe: Recipe,
    ref: CheckpointRef,
    embeddings_dir: Path,
    out_dir: Path,
) -> pa.Table:
    """Mine candidates and negatives for the queries of stage 2, or read what was mined from exactly this before.

    Embeds under `embeddings_dir` (mine/rank.py), validation too when `max_similarity` is "calibrate". A query's own
    picture is never a candidate. What each filter dropped is printed, once, and kept in `out_dir/manifest.json`.

    Returns:
        Columns of MINED, in the order of the query table.

    Raises:
        UserError: a task without a training pool, unreadable checkpoint, disk full.
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
    embedded = embed_split(embedders, dataset, split, ref, embeddings_dir)
    ranking = rank(embedded, dataset, split, recipe.stage2.mining.pool, recipe.stage2.mining.depth)
    mined, counts = _choose(ranking, embedded, dataset, recipe, thresholds)
    done = {row["query_id"] for row in mined}
    missing = [id_ for id_ in queries["id"].to_pylist() if id_ not in done]
    quarantined = [(id_, "not embedded or without a pool; see the embeddings' quarantine.parquet") for id_ in missing]
    write_shard(out_dir, 0, pa.Table.from_pylist(mined, MINED), quarantined)
    facts = {"max_similarity": thresholds, "candidates": {task: dict(c) for task, c in counts.items()}}
    print(_summary(close_output(out_dir, queries.num_rows, facts)))
    return read_shards(out_dir)


def _choose(
    ranking: pa.Table, embedded: Embedded, dataset: Dataset, recipe: Recipe, thresholds: dict[str, float]
) -> tuple[list[dict], dict[str, Counter]]:
    """Judge every candidate and choose every query's negatives."""
    mining, count, split = recipe.stage2.mining, recipe.stage2.train.hard_negatives, recipe.stage2.train.queries
    columns = [
        name for name in ("id", "text", "image", "concept", "modality") if name in dataset.documents.column_names
    ]
    documents = {row["id"]: _light(row) for row in dataset.documents.select(columns).to_pylist()}
    with_content, with_picture = defaultdict(list), defaultdict(list)
    for id_, document in documents.items():
        with_content[document["content"]].append(id_)
        with_picture[document["content"][1]].append(id_)
    queries = {row["id"]: row for row in dataset.queries(split).to_pylist()}
    positives = _positive_scores(embedded, queries) if mining.margin is not None else {}
    everything = dataset.global_pool(split)
    pools = {
        task: everything if mining.pool == "global" else dataset.pool(task, split) for task in dataset.tasks(split)
    }
    mined, counts = [], defaultdict(Counter)
    for number, row in enumerate(ranking.to_pylist()):
        query, ids = queries[row["query_id"]], row["document_ids"]
        gold = set(query["positive_ids"])
        gold_contents = {documents[id_]["content"] for id_ in gold}
        verdicts = judge(
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
        # What must not be drawn at random either: too deep to be a candidate, or never one.
        refused = gold.union(*(with_content[content] for content in gold_contents))
        refused.update(own_pictures(query, gold, with_picture))
        refused.update(id_ for id_, keep in zip(ids, kept, strict=True) if not keep)
        negatives = choose_negatives(
            [id_ for id_, keep in zip(ids, kept, strict=True) if keep],
            count,
            mining.min_rank,
            (mining.random_mix_of or {}).get(row["task"], mining.random_mix),
            pools[row["task"]],
            refused,
            np.random.default_rng([recipe.seed, number]),
        )
        mined.append(
            {name: row[name] for name in ("query_id", "task", "document_ids", "scores")}
            | {"kept": kept, "negative_ids": negatives}
        )
    order = {id_: place for place, id_ in enumerate(queries)}
    return sorted(mined, key=lambda row: order[row["query_id"]]), counts


def is_false_negative(query: dict, document: dict, gold: list[dict]) -> bool:
    """Whether a document that is not gold answers the query, where tables say what they show (column `concept`).

    It does when it shows the query's concept in the same modality as a gold document. Queries that ask for a change of
    their picture (picture and text in, picture out) are left out: the unchanged concept is no answer to them.
    """
    if query.get("concept") is None or document.get("concept") != query["concept"]:
        return False
    wanted = {row["modality"] for row in gold}
    asks_change = query["modality"] == "image,text" and wanted == {"image"}
    return document["modality"] in wanted and not asks_change


def _thresholds(
    embedders: EmbedderGroup, dataset: Dataset, recipe: Recipe, ref: CheckpointRef, embeddings_dir: Path
) -> dict[str, float]:
    """The largest similarity a negative may have, by task: fixed, or calibrated on each task's validation queries.

    By task because cosines are not comparable between modalities; a task without validation queries takes the median.
    """
    mining, tasks = recipe.stage2.mining, dataset.tasks(recipe.stage2.train.queries)
    if mining.max_similarity != "calibrate":
        return dict.fromkeys(tasks, mining.max_similarity)
    embedded = embed_split(embedders, dataset, CALIBRATION_SPLIT, ref, embeddings_dir)
    ranking = rank(embedded, dataset, CALIBRATION_SPLIT, mining.pool, mining.depth)
    queries = {row["id"]: row for row in dataset.queries(CALIBRATION_SPLIT).select(["id", "positive_ids"]).to_pylist()}
    gold_scores: dict[str, list] = defaultdict(list)
    others: dict[str, list] = defaultdict(list)
    for row in ranking.to_pylist():
        gold = set(queries[row["query_id"]]["positive_ids"])
        for id_, score in zip(row["document_ids"], row["scores"], strict=True):
            (gold_scores if id_ in gold else others)[row["task"]].append(score)
    found = {
        task: calibrate_threshold(np.array(gold_scores[task]), np.array(others[task]))
        for task in set(ranking["task"].to_pylist())
    }
    return {task: found.get(task, float(np.median(list(found.values())))) for task in tasks}


def _positive_scores(embedded: Embedded, queries: dict[str, dict]) -> dict[str, float]:
    """Each query's cosine to its nearest gold document."""
    search, place_of = embedded.documents, embedded.queries.row_of()
    pairs = [
        (id_, place_of[id_], search.row_of[gold])
        for id_, query in queries.items()
        if id_ in place_of
        for gold in query["positive_ids"]
        if gold in search.row_of
    ]
    places, rows = np.array([pair[1] for pair in pairs]), np.array([pair[2] for pair in pairs])
    best: dict[str, float] = {}
    for (id_, _, _), score in zip(pairs, search.pair_scores(embedded.queries.vectors[places], rows), strict=True):
        best[id_] = max(float(score), best.get(id_, -1.0))
    return best


def _light(row: dict) -> dict:
    return {"content": content_key(row), "concept": row.get("concept"), "modality": row.get("modality")}


def _summary(manifest: dict) -> str:
    total = sum((Counter(counts) for counts in manifest["candidates"].values()), Counter())
    false = {name.removeprefix("false negative, "): n for name, n in total.items() if name.startswith("false")}
    seen = sum(n for name, n in total.items() if not name.startswith("false"))
    shares = " · ".join(f"{name} {n / seen:.1%}" for name, n in total.items() if not name.startswith("false"))
    lines = [f"mined {manifest['written']:,} queries, {seen:,} candidates: {shares}"]
    if false:
        caught = false.get(SAME_CONTENT, 0) + false.get(TOO_SIMILAR, 0)
        share = caught / sum(false.values())
        lines.append(f"true false negatives among them: {sum(false.values()):,}; caught by the filters {share:.1%}")
    return "\n".join(lines)
