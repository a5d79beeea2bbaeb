"""Evaluate a checkpoint: Recall@k per task in local and global pools, by exact search (docs/method.md#evaluation).

result = evaluate_checkpoint(embedders, dataset, recipe, ref, "text", run / "evaluation" / "text")
base = evaluate_base(embedders, dataset, recipe, base, run / "evaluation" / "base")
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from umarvel_ray.data.content import digest_of_table
from umarvel_ray.data.tables import Dataset
from umarvel_ray.evaluate.results import SCOPES, LadderResult, load_result, save_rankings
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.recipe import Recipe
from umarvel_ray.retrieve.metrics import not_ranked, positives_of, score_ranking
from umarvel_ray.retrieve.rank import embed_split, rank

MIN_DEPTH = 10  # documents kept per query even if no metric or reranker needs them


def evaluate_checkpoint(
    embedders: EmbedderGroup,
    dataset: Dataset,
    recipe: Recipe,
    ref: CheckpointRef,
    name: str,
    out_dir: str | Path,
    split: str | None = None,
) -> LadderResult:
    """Embed the split's queries and the union of its pools once, then rank and score in local and global pools.

    A finished evaluation of the same inputs is read back; an interrupted one resumes.

    Args:
        name: of the result: the phase that made the checkpoint, or "base".
        out_dir: where the embeddings, the rankings and `result.json` are written.
        split: None for `recipe.evaluate.split`.

    Raises:
        UserError: an empty or missing pool, an unreadable checkpoint, or a full disk.
    """
    start, folder, split = time.monotonic(), Path(out_dir), split or recipe.evaluate.split
    identity = _digest(
        ref.identity,
        name,
        split,
        recipe.evaluate.model_dump_json(),
        digest_of_table(dataset.documents),
        digest_of_table(dataset.queries(split)),
        digest_of_table(dataset.pools),
    )
    if saved := load_result(folder, identity):
        return saved
    embedded = embed_split(embedders, dataset, split, ref, folder)
    depth = max(recipe.evaluate.rerank_top, MIN_DEPTH, recipe.evaluate.k, *recipe.evaluate.k_of.values())
    drop = recipe.evaluate.drop_query_image
    rankings = {scope: rank(embedded, dataset, split, scope, depth, drop) for scope in SCOPES}
    save_rankings(folder, rankings)
    positives = positives_of(dataset, split)
    lost = not_ranked(dataset.queries(split), rankings["local"])
    result = LadderResult(
        name,
        {scope: score_ranking(ranking, positives, recipe.evaluate, lost) for scope, ranking in rankings.items()},
        folder,
        identity,
        time.monotonic() - start,
        {"pooling": ref.settings.pooling},
    )
    result.save()
    return result


def evaluate_base(
    embedders: EmbedderGroup, dataset: Dataset, recipe: Recipe, base: str | Path, out_dir: str | Path
) -> LadderResult:
    """The untrained base with mean or last-token pooling, whichever has the better average local recall.

    `notes["pooling"]` of the result names the choice.
    """
    results = [
        evaluate_checkpoint(
            embedders,
            dataset,
            recipe,
            CheckpointRef.of(base, recipe.model.model_copy(update={"pooling": pooling})),
            "base",
            Path(out_dir) / pooling,
        )
        for pooling in ("last", "mean")
    ]
    return max(results, key=lambda result: result.local["average"])


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
