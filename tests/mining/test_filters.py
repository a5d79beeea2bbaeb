"""The filters for negatives, on cases worked out by hand."""

import numpy as np
import pytest

from umarvel_ray.mining.filters import calibrate_threshold, choose_negatives, judge

IDS = ["gold", "twin", "near", "hard", "easy"]
SCORES = [0.9, 0.85, 0.8, 0.6, 0.1]
CONTENTS = [("a red car", None), ("a red car", None), ("a crimson car", None), ("a red bus", None), ("a cat", None)]
RULES = {"gold": {"gold"}, "gold_contents": {("a red car", None)}}


def test_each_rule_in_order():
    verdicts = judge(IDS, SCORES, CONTENTS, max_similarity=0.7, **RULES)
    assert verdicts == ["gold", "same content", "too similar", "kept", "kept"]


def test_gold_is_gold_even_above_the_threshold_and_the_threshold_itself_is_allowed():
    assert judge(IDS, SCORES, CONTENTS, max_similarity=0.8, **RULES) == ["gold", "same content", "kept", "kept", "kept"]


def test_margin_is_relative_to_the_positive():
    verdicts = judge(IDS, SCORES, CONTENTS, max_similarity=1.0, margin=0.5, positive_score=0.9, **RULES)
    assert verdicts == ["gold", "same content", "too similar", "too similar", "kept"]  # ceiling 0.45


def test_negatives_start_at_min_rank_and_mix_in_random_ones():
    kept, pool = [f"k{i}" for i in range(10)], [f"p{i}" for i in range(50)]
    chosen = choose_negatives(kept, 4, 2, 0.5, pool, {"p0"}, np.random.default_rng(0))
    assert chosen[:2] == ["k2", "k3"]
    assert len(set(chosen)) == 4
    assert set(chosen[2:]) <= set(pool) - {"p0"}


@pytest.mark.parametrize("kept", [[], ["a"], ["a", "b", "c"]])
def test_too_few_kept_are_filled_from_the_pool_without_repeats(kept):
    pool = ["a", "b", "c", "d", "gold"]
    for seed in range(20):
        chosen = choose_negatives(kept, 4, 0, 0.0, pool, {"gold"}, np.random.default_rng(seed))
        assert sorted(chosen) == ["a", "b", "c", "d"]
        assert chosen[: len(kept)] == kept


def test_an_exhausted_pool_gives_fewer():
    assert choose_negatives([], 3, 0, 0.0, ["a", "gold"], {"gold"}, np.random.default_rng(0)) == ["a"]


def test_threshold_separates_when_it_can():
    threshold = calibrate_threshold(np.array([0.8, 0.9]), np.array([0.1, 0.2, 0.7]))
    assert 0.7 < threshold < 0.8


def test_threshold_maximizes_f1_over_every_cut():
    rng = np.random.default_rng(3)
    gold, other = rng.normal(0.6, 0.15, 40), rng.normal(0.4, 0.15, 400)

    def f1(threshold):
        hits, wrong = (gold > threshold).sum(), (other > threshold).sum()
        return 2 * hits / (2 * hits + wrong + len(gold) - hits)

    best = max(f1(t) for t in np.linspace(-1, 2, 30001))
    assert f1(calibrate_threshold(gold, other)) == pytest.approx(best)


def test_without_gold_scores_nothing_is_dropped():
    assert calibrate_threshold(np.array([]), np.array([0.5])) == 1.0
