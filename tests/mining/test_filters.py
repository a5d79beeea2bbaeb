"""The filters for negatives, on cases worked out by hand and against a loop over candidates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umarvel_ray.mining.filters import VERDICTS, best_kept, calibrate_threshold, ceilings, fill_at_random, judge
from umarvel_ray.ragged import Ragged

# Documents: 0 gold, 1 its twin, 2 near, 3 hard, 4 easy.
SCORES = np.array([0.9, 0.85, 0.8, 0.6, 0.1], np.float32)
CONTENT = np.array([7, 7, 5, 3, 2])


def verdicts_of(ceiling: float) -> list[str]:
    found = judge(Ragged.of([range(5)]), SCORES, Ragged.of([[0]]), CONTENT, np.array([ceiling]))
    return [VERDICTS[code] for code in found]


def test_each_rule_in_order():
    assert verdicts_of(0.7) == ["gold", "same content", "too similar", "kept", "kept"]


def test_gold_is_gold_even_above_the_threshold_and_the_threshold_itself_is_allowed():
    assert verdicts_of(float(SCORES[2])) == ["gold", "same content", "kept", "kept", "kept"]


def test_margin_is_relative_to_the_positive():
    known = ceilings(np.array([1.0, 1.0, 0.3]), 0.5, np.array([0.9, np.nan, 0.9], np.float32))
    assert known == pytest.approx([0.45, 1.0, 0.3])
    assert ceilings(np.array([1.0]), None, np.array([0.9])).tolist() == [1.0]
    assert verdicts_of(known[0]) == ["gold", "same content", "too similar", "too similar", "kept"]


@st.composite
def judged(draw):
    """Candidates, positives and ceilings of some queries over twelve documents, some of equal content."""
    queries = draw(st.integers(0, 5))
    documents = st.lists(st.integers(0, 11), unique=True, max_size=8)
    candidates = [draw(documents) for _ in range(queries)]
    positives = [draw(st.lists(st.integers(0, 11), unique=True, min_size=1, max_size=3)) for _ in range(queries)]
    content = [draw(st.integers(0, 5)) for _ in range(12)]
    ceiling = [draw(st.sampled_from([0.25, 0.5, 0.75])) for _ in range(queries)]
    scores = [draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])) for own in candidates for _ in own]
    return candidates, positives, content, ceiling, scores


@given(judged())
def test_many_queries_at_once_are_judged_like_one_candidate_after_the_other(case):
    candidates, positives, content, ceiling, scores = case
    expected, score = [], iter(scores)
    for own, gold, limit in zip(candidates, positives, ceiling, strict=True):
        for document in own:
            if document in gold:
                expected.append("gold")
            elif content[document] in {content[other] for other in gold}:
                expected.append("same content")
            else:
                expected.append("kept")
            if next(score) > limit and expected[-1] == "kept":
                expected[-1] = "too similar"
    found = judge(
        Ragged.of(candidates),
        np.array(scores, np.float32),
        Ragged.of(positives),
        np.array(content),
        np.array(ceiling, float),
    )
    assert [VERDICTS[code] for code in found] == expected


@given(judged(), st.integers(0, 3), st.integers(0, 4))
def test_the_best_that_were_kept_by_rank(case, first, count):
    candidates, *_, scores = case
    kept = np.array(scores) > 0.4
    mask, expected = iter(kept.tolist()), []
    for own in candidates:
        passed = [document for document in own if next(mask)]
        expected.append(passed[first : first + count])
    found = best_kept(Ragged.of(candidates), kept, first, first + count)
    assert [own.tolist() for own in found.lists()] == expected


def test_random_negatives_are_no_forbidden_ones():
    pool = np.arange(100, 150)
    chosen = fill_at_random(np.array([7, 8]), 4, pool, {100}, np.random.default_rng(0))
    assert chosen[:2] == [7, 8]
    assert len(set(chosen)) == 4
    assert set(chosen[2:]) <= set(pool.tolist()) - {100}


@pytest.mark.parametrize("kept", [[], [1], [1, 2, 3]])
def test_too_few_kept_are_filled_from_the_pool_without_repeats(kept):
    for seed in range(20):
        chosen = fill_at_random(np.array(kept, int), 4, np.arange(5), {0}, np.random.default_rng(seed))
        assert sorted(chosen) == [1, 2, 3, 4]
        assert chosen[: len(kept)] == kept


def test_an_exhausted_pool_gives_fewer():
    nothing = np.array([], int)
    assert fill_at_random(nothing, 3, nothing, set(), np.random.default_rng(0)) == []
    assert fill_at_random(np.array([], int), 3, np.array([1, 0]), {0}, np.random.default_rng(0)) == [1]


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


def test_without_scores_of_both_kinds_nothing_is_dropped():
    assert calibrate_threshold(np.array([]), np.array([0.5])) == 1.0
    assert calibrate_threshold(np.array([0.5]), np.array([])) == 1.0
