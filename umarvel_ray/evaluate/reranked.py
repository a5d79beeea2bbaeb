"""The last row of the ladder: the candidates of the distilled embedder, reranked (U-MARVEL+ in the paper).

result = evaluate_reranked(rerankers, dataset, recipe, ref, test, calibration, run / "evaluation" / "rerank")
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from umarvel_ray.data.dataset import Dataset, Queries
from umarvel_ray.evaluate.results import RERANKED, SCOPES, LadderResult, open_result, ranking_folder
from umarvel_ray.evaluate.separation import separation
from umarvel_ray.inference.score import RerankerGroup, score_table
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import MODELS, Recipe
from umarvel_ray.retrieve.fusion import answers_of, calibrate_weight, candidates_to_score, fuse_rankings
from umarvel_ray.retrieve.metrics import score_ranking
from umarvel_ray.retrieve.rank import Scope, write_ranking

VALIDATION = "validation"


class Calibration(NamedTuple):
    """What the fusion weight is chosen on: some validation queries in a dataset, and the embedder's result on them."""

    dataset: Dataset
    result: LadderResult


def evaluate_reranked(
    rerankers: RerankerGroup,
    dataset: Dataset,
    recipe: Recipe,
    ref: CheckpointRef,
    test: LadderResult,
    calibration: Calibration | None,
    out_dir: str | Path,
) -> LadderResult:
    """Score the top candidates of every query with the reranker and fuse the scores (`retrieve/fusion.py`).

    Args:
        ref: the reranker's checkpoint.
        test: the embedder's result on `recipe.evaluate.split`.
        calibration: required if `evaluate.rerank_weight` is "calibrate".

    Raises:
        UserError: an unreadable checkpoint, or a full disk.
    """
    start, folder, top = time.monotonic(), Path(out_dir), recipe.evaluate.rerank_top
    identity = f"{test.identity} {ref.identity} {recipe.evaluate.model_dump_json(exclude=MODELS)}"
    if saved := open_result(folder, identity):
        return saved
    if recipe.evaluate.rerank_weight == "calibrate":
        assert calibration is not None, "the weight cannot be calibrated on nothing"
        weights = _calibrated(rerankers, recipe, ref, calibration, folder / "validation-scores")
    else:
        weights = dict.fromkeys(SCOPES, recipe.evaluate.rerank_weight)
    split = recipe.evaluate.split
    scored = _scored(rerankers, dataset, split, test, ref, top, folder / "test-scores")
    scores = {}
    for scope in SCOPES:
        ranking = test.ranking(scope)
        fused = fuse_rankings(ranking, answers_of(scored, ranking), weights[scope], top)
        write_ranking(ranking_folder(folder, scope), fused)
        scores[scope] = score_ranking(fused, dataset.queries(split), recipe.evaluate)
    notes = {f"weight {scope}": weight for scope, weight in weights.items()}
    notes |= _areas(scored, test.ranking("local"), dataset.queries(split), weights["local"], top)
    seconds = time.monotonic() - start
    result = LadderResult(RERANKED, scores, folder, identity, seconds, notes)
    result.save()
    return result


def _areas(scored: pa.Table, ranking: pa.Table, queries: Queries, weight: float, top: int) -> dict[str, float]:
    """AUC in the top of a ranking, by the reranker, by the embedder and by the fused score."""
    candidates = candidates_to_score([ranking], top)
    answers = Ragged.of_arrow(candidates["documents"]).like(answers_of(scored, candidates))
    found = separation(candidates.append_column("rerank_scores", answers), queries, 1 / (1 + weight))
    areas = {"reranker": found.reranker, "embedder": found.embedder, "fused": found.fused}
    return {f"AUC {name}": round(area, 4) for name, area in areas.items() if area is not None}


def _calibrated(
    rerankers: RerankerGroup, recipe: Recipe, ref: CheckpointRef, calibration: Calibration, folder: Path
) -> dict[Scope, float]:
    """The weight of each scope that is best on the validation queries."""
    settings, (dataset, result) = recipe.evaluate, calibration
    queries = dataset.queries(VALIDATION)
    scored = _scored(rerankers, dataset, VALIDATION, result, ref, settings.rerank_top, folder)
    weights = {}
    for scope in SCOPES:
        ranking = result.ranking(scope)
        weights[scope] = calibrate_weight(ranking, answers_of(scored, ranking), queries, settings, settings.rerank_top)
    return weights


def _scored(
    rerankers: RerankerGroup,
    dataset: Dataset,
    split: str,
    result: LadderResult,
    ref: CheckpointRef,
    top: int,
    folder: Path,
) -> pa.Table:
    """The first `top` documents of all rankings with P(yes)."""
    candidates = candidates_to_score([result.ranking(scope) for scope in SCOPES], top)
    return score_table(
        rerankers, candidates, dataset.queries(split), dataset.documents, folder, ref, f"{split} queries"
    )
