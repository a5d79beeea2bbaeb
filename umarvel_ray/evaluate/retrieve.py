"""Evaluate a checkpoint: Recall@k per task in local and global pools, by exact search (method section 6).

result = evaluate_checkpoint(pool, dataset, recipe, checkpoint, "text", run / "evaluation" / "text")
base = evaluate_base(pool, dataset, recipe, base, run / "evaluation" / "base")
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from umarvel_ray.data.tables import Dataset
from umarvel_ray.evaluate.results import SCOPES, StepResult, load_result, not_ranked, positives_of, save_rankings, score
from umarvel_ray.mine.embed import EmbedderPool, describe
from umarvel_ray.mine.rank import embed_split, rank
from umarvel_ray.mine.shards import digest_of_table
from umarvel_ray.recipe import ModelSettings, Recipe

SHOWN = 10  # documents kept per query when no metric or reranker needs more


def evaluate_checkpoint(
    pool: EmbedderPool,
    dataset: Dataset,
    recipe: Recipe,
    checkpoint: str | Path,
    step: str,
    out_dir: str | Path,
    split: str | None = None,
    settings: ModelSettings | None = None,
) -> StepResult:
    """Embed the union of the split's pools and its queries once, rank both ways, score.

    A finished evaluation of the same files is read back; a half-done one goes on where it stopped.

    Args:
        out_dir: gets the embeddings, the rankings and `result.json`.
        split: recipe.evaluate.split when None.
        settings: override the checkpoint's own.

    Raises:
        UserError: an empty or missing pool, an unreadable checkpoint, disk full.
    """
    start, folder, split = time.monotonic(), Path(out_dir), split or recipe.evaluate.split
    described = describe(checkpoint, settings)
    identity = _digest(
        described["identity"],
        step,
        split,
        recipe.evaluate.model_dump_json(),
        digest_of_table(dataset.documents),
        digest_of_table(dataset.queries(split)),
        digest_of_table(dataset.pools),
    )
    if saved := load_result(folder, identity):
        return saved
    embedded = embed_split(pool, dataset, split, checkpoint, folder, settings)
    depth = max(recipe.evaluate.rerank_top, SHOWN, recipe.evaluate.k, *recipe.evaluate.k_of.values())
    drop = recipe.evaluate.drop_query_image
    rankings = {scope: rank(embedded, dataset, split, scope, depth, drop) for scope in SCOPES}
    save_rankings(folder, rankings)
    positives = positives_of(dataset, split)
    lost = not_ranked(dataset.queries(split), rankings["local"])
    result = StepResult(
        step,
        {scope: score(ranking, positives, recipe.evaluate, lost) for scope, ranking in rankings.items()},
        folder,
        identity,
        time.monotonic() - start,
        {"pooling": described["settings"].pooling},
    )
    result.save()
    return result


def evaluate_base(
    pool: EmbedderPool, dataset: Dataset, recipe: Recipe, base: str | Path, out_dir: str | Path
) -> StepResult:
    """The untrained base at the better (average local recall) of its mean and last pooling; `notes` says which."""
    results = [
        evaluate_checkpoint(
            pool,
            dataset,
            recipe,
            base,
            "base",
            Path(out_dir) / pooling,
            settings=recipe.model.model_copy(update={"pooling": pooling}),
        )
        for pooling in ("last", "mean")
    ]
    return max(results, key=lambda result: result.local["average"])


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
