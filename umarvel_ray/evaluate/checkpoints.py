"""Evaluate a checkpoint: Recall@k per task in local and global pools, by exact search (docs/method.md#evaluation).

result = evaluate_checkpoint(embedders, dataset, recipe, ref, "text", run / "evaluation" / "text")
base = evaluate_base(embedders, dataset, recipe, base, run / "evaluation" / "base")
"""

from __future__ import annotations

import time
from pathlib import Path

from umarvel_ray.data.content import digest_of
from umarvel_ray.data.dataset import Dataset
from umarvel_ray.evaluate.results import SCOPES, LadderResult, open_result, ranking_folder
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.recipe import MODELS, Recipe
from umarvel_ray.retrieve.metrics import score_ranking
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
    embedded_in: Path | None = None,
) -> LadderResult:
    """Embed the split's queries and the union of its pools once, then rank and score in local and global pools.

    A finished evaluation of the same inputs is read back; an interrupted one resumes.

    Args:
        name: of the result: the phase that made the checkpoint, or "base".
        out_dir: where the embeddings, the rankings and `result.json` are written.
        split: None for `recipe.evaluate.split`.
        embedded_in: where embeddings are written, to be shared with other evaluations; None for `out_dir`.

    Raises:
        UserError: an empty or missing pool, an unreadable checkpoint, or a full disk.
    """
    start, folder, split = time.monotonic(), Path(out_dir), split or recipe.evaluate.split
    queries, settings = dataset.queries(split), recipe.evaluate
    identity = digest_of(
        ref.identity,
        name,
        split,
        settings.model_dump_json(exclude=MODELS),
        dataset.documents.digest,
        queries.digest,
        dataset.digest_of_pools(split),
    )
    if saved := open_result(folder, identity):
        return saved
    embedded = embed_split(embedders, dataset, split, ref, embedded_in or folder)
    depth = max(settings.rerank_top, MIN_DEPTH, settings.k, *settings.k_of.values())
    scores = {}
    for scope in SCOPES:
        place = ranking_folder(folder, scope)
        ranking = rank(embedded, dataset, split, scope, depth, place, settings.drop_query_image)
        scores[scope] = score_ranking(ranking, queries, settings)
    seconds, notes = time.monotonic() - start, {"pooling": ref.settings.pooling}
    result = LadderResult(name, scores, folder, identity, seconds, notes)
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
