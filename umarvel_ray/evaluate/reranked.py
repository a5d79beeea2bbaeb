"""The last row of the ladder: the candidates of the distilled embedder, reranked (U-MARVEL+ in the paper).

result = evaluate_reranked(rerankers, dataset, recipe, ref, test, validation, run / "evaluation" / "rerank")
"""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa

from umarvel_ray.data.tables import Dataset
from umarvel_ray.evaluate.results import RERANKED, SCOPES, LadderResult, load_result, save_rankings
from umarvel_ray.inference.score import RerankerGroup, score_table
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.recipe import Recipe
from umarvel_ray.retrieve.fusion import Answers, answers_of, calibrate_weight, candidates_to_score, fuse_rankings
from umarvel_ray.retrieve.metrics import not_ranked, positives_of, score_ranking

VALIDATION = "validation"


def evaluate_reranked(
    rerankers: RerankerGroup,
    dataset: Dataset,
    recipe: Recipe,
    ref: CheckpointRef,
    test: LadderResult,
    validation: LadderResult | None,
    out_dir: str | Path,
) -> LadderResult:
    """Score the top candidates of every query with the reranker and fuse the scores (`retrieve/fusion.py`).

    Args:
        ref: the reranker's checkpoint.
        test: the embedder's result on `recipe.evaluate.split`.
        validation: its result on the validation split, required if `evaluate.rerank_weight` is "calibrate".

    Raises:
        UserError: an unreadable checkpoint, or a full disk.
    """
    start, folder, top = time.monotonic(), Path(out_dir), recipe.evaluate.rerank_top
    identity = f"{test.identity} {ref.identity} {recipe.evaluate.model_dump_json()}"
    if saved := load_result(folder, identity):
        return saved
    split = recipe.evaluate.split
    answers = _answers(rerankers, dataset, split, test, ref, top, folder / "test-scores")
    weight = recipe.evaluate.rerank_weight
    if weight == "calibrate":
        assert validation is not None, "calibrating the weight needs the validation result"
        known = _answers(rerankers, dataset, VALIDATION, validation, ref, top, folder / "validation-scores")
        positives = positives_of(dataset, VALIDATION)
        weights = {
            scope: calibrate_weight(validation.ranking(scope), known, positives, recipe.evaluate, top)
            for scope in SCOPES
        }
    else:
        weights = dict.fromkeys(SCOPES, weight)
    rankings = {scope: fuse_rankings(test.ranking(scope), answers, weights[scope], top) for scope in SCOPES}
    save_rankings(folder, rankings)
    positives = positives_of(dataset, split)
    lost = not_ranked(dataset.queries(split), rankings["local"])
    result = LadderResult(
        RERANKED,
        {scope: score_ranking(rankings[scope], positives, recipe.evaluate, lost) for scope in SCOPES},
        folder,
        identity,
        time.monotonic() - start,
        {f"weight {scope}": weight for scope, weight in weights.items()},
    )
    result.save()
    return result


def _answers(
    rerankers: RerankerGroup,
    dataset: Dataset,
    split: str,
    result: LadderResult,
    ref: CheckpointRef,
    top: int,
    folder: Path,
) -> Answers:
    candidates: pa.Table = candidates_to_score([result.ranking(scope) for scope in SCOPES], top)
    scored = score_table(
        rerankers, candidates, dataset.queries(split), dataset.documents, folder, ref, f"{split} queries"
    )
    return answers_of(scored)
