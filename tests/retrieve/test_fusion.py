"""Score fusion and the choice of its weight, on cases worked out by hand."""

import pyarrow as pa
import pytest

from umarvel_ray.recipe import Evaluate
from umarvel_ray.retrieve.fusion import answers_of, calibrate_weight, candidates_to_score, fuse_rankings
from umarvel_ray.retrieve.metrics import score_ranking
from umarvel_ray.retrieve.rank import RANKING


def ranking(rows: dict[str, list[tuple[str, float]]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"query_id": id_, "task": "t", "document_ids": [d for d, _ in found], "scores": [s for _, s in found],
             "pool_size": 10}
            for id_, found in rows.items()
        ],
        RANKING,
    )  # fmt: skip


def test_fusion_by_hand():
    first = ranking({"q": [("a", 0.9), ("b", 0.8), ("c", 0.5), ("d", 0.4)]})
    answers = {("q", "a"): 0.0, ("q", "b"): 0.5, ("q", "c"): 1.0, ("q", "d"): 1.0}
    fused = fuse_rankings(first, answers, 0.5, top=3).to_pylist()[0]
    assert fused["document_ids"] == ["b", "c", "a", "d"]  # 1.05, 1.0, 0.9; d is beyond `top`
    assert fused["scores"] == pytest.approx([1.05, 1.0, 0.9, 0.4])
    assert fuse_rankings(first, answers, 0.0, top=3).equals(first)


def test_weight_is_the_best_on_validation():
    validation = ranking({"q": [("a", 0.9), ("b", 0.8), ("c", 0.5)], "r": [("x", 0.9), ("y", 0.6)]})
    answers = {("q", "b"): 0.9, ("r", "y"): 0.25}  # q needs w > 1/9, r needs w < 1.2
    positives = {"q": {"b"}, "r": {"x"}}
    settings = Evaluate(k=1)
    weight = calibrate_weight(validation, answers, positives, settings, top=3)
    assert weight == 0.2
    assert score_ranking(fuse_rankings(validation, answers, weight, 3), positives, settings, {})["t"]["recall"] == 1.0
    assert score_ranking(validation, positives, settings, {"t": ["lost"]})["t"]["recall"] == pytest.approx(1 / 3)


def test_candidates_are_joined_once():
    local = ranking({"q": [("a", 0.9), ("b", 0.8), ("c", 0.5)]})
    global_ranking = ranking({"q": [("z", 0.95), ("a", 0.9), ("b", 0.8)]})
    joined = candidates_to_score([local, global_ranking], 2).to_pylist()
    assert joined[0]["document_ids"] == ["a", "b", "z"]
    assert joined[0]["scores"] == pytest.approx([0.9, 0.8, 0.95])
    scored = pa.Table.from_pylist([joined[0] | {"rerank_scores": [0.1, 0.2, 0.3]}])
    assert answers_of(scored) == {("q", "a"): 0.1, ("q", "b"): 0.2, ("q", "z"): 0.3}
