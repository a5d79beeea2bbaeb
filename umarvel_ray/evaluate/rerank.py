"""The last row of the ladder: the distilled embedder's candidates, reranked (U-MARVEL+).

result = evaluate_reranked(reranker_pool, dataset, recipe, reranker, test, validation, run / "evaluation" / "rerank")
"""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa

from umarvel_ray.data.tables import Dataset
from umarvel_ray.evaluate.fusion import Answers, answers_of, calibrate_weight, candidates_to_score, fuse
from umarvel_ray.evaluate.results import (
    RERANKED,
    SCOPES,
    StepResult,
    load_result,
    not_ranked,
    positives_of,
    save_rankings,
    score,
)
from umarvel_ray.mine.embed import describe
from umarvel_ray.mine.teacher import RerankerPool, score_table
from umarvel_ray.recipe import Recipe

VALIDATION = "validation"


def evaluate_reranked(
    pool: RerankerPool,
    dataset: Dataset,
    recipe: Recipe,
    checkpoint: str | Path,
    test: StepResult,
    validation: StepResult | None,
    out_dir: str | Path,
) -> StepResult:
    """Score the top candidates of every query with the reranker and fuse.

    Args:
        checkpoint: the reranker's.
        test: the embedder's result on recipe.evaluate.split.
        validation: its result on the validation split, for the weight; not used where the recipe fixes the weight.

    Raises:
        UserError: unreadable checkpoint, disk full.
    """
    start, folder, top = time.monotonic(), Path(out_dir), recipe.evaluate.rerank_top
    identity = f"{test.identity} {describe(checkpoint)['identity']} {recipe.evaluate.model_dump_json()}"
    if saved := load_result(folder, identity):
        return saved
    split = recipe.evaluate.split
    answers = _answers(pool, dataset, split, test, checkpoint, top, folder / "test-scores")
    weights = dict.fromkeys(SCOPES, recipe.evaluate.rerank_weight)
    if recipe.evaluate.rerank_weight == "calibrate":
        known = _answers(pool, dataset, VALIDATION, validation, checkpoint, top, folder / "validation-scores")
        positives = positives_of(dataset, VALIDATION)
        weights = {
            scope: calibrate_weight(validation.ranking(scope), known, positives, recipe.evaluate, top)
            for scope in SCOPES
        }
    rankings = {scope: fuse(test.ranking(scope), answers, weights[scope], top) for scope in SCOPES}
    save_rankings(folder, rankings)
    positives = positives_of(dataset, split)
    lost = not_ranked(dataset.queries(split), rankings["local"])
    result = StepResult(
        RERANKED,
        {scope: score(rankings[scope], positives, recipe.evaluate, lost) for scope in SCOPES},
        folder,
        identity,
        time.monotonic() - start,
        {f"weight {scope}": weight for scope, weight in weights.items()},
    )
    result.save()
    return result


def _answers(
    pool: RerankerPool, dataset: Dataset, split: str, result: StepResult, checkpoint: str | Path, top: int, folder: Path
) -> Answers:
    candidates: pa.Table = candidates_to_score([result.ranking(scope) for scope in SCOPES], top)
    scored = score_table(
        pool, candidates, dataset.queries(split), dataset.documents, folder, checkpoint, f"{split} queries"
    )
    return answers_of(scored)
