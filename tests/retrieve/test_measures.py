"""The metrics of published benchmarks, against their definitions one query at a time and against trec_eval."""

import numpy as np
import pytest

from tests.support import rankings as truth
from tests.support.rankings import make_queries, make_ranking, random_queries, random_ranking
from umarvel_ray.retrieve.metrics import depth_of, measures

NAMES = ("accuracy", "R@1", "R@5", "R@10", "mAP@5", "mAP@10", "mAP@25", "nDCG@10", "MRR@10")


def average_precision(ranked: list[int], relevant: set[int], k: int) -> float:
    """As CIRCO's server computes it."""
    precisions = [
        len(relevant & set(ranked[: place + 1])) / (place + 1)
        for place, document in enumerate(ranked[:k])
        if document in relevant
    ]
    return sum(precisions) / min(k, len(relevant))


def one_by_one(name: str, ranked: list[int], relevant: set[int]) -> float:
    kind, _, depth = name.partition("@")
    if kind == "mAP":
        return average_precision(ranked, relevant, int(depth))
    if kind == "nDCG":
        return truth.ndcg_at_k(ranked, relevant)
    if kind == "MRR":
        return truth.mrr_at_k(ranked, relevant)
    return truth.hit_at_k(ranked, relevant, int(depth or 1))


def by_task_one_by_one(ranking, queries) -> dict[str, dict[str, list[float]]]:
    found = {row["query"]: row["documents"] for row in ranking.to_pylist()}
    values: dict = {}
    for row, positives, code in zip(queries.rows.tolist(), queries.positives.lists(), queries.task, strict=True):
        own = values.setdefault(queries.tasks[code], {name: [] for name in NAMES})
        for name in NAMES:
            own[name].append(one_by_one(name, found.get(row, []), set(positives.tolist())))
    return values


def test_average_precision_by_hand():
    """Truths 1, 2 and 3 at ranks 1 and 3: (1/1 + 2/3) / 3; of the first two ranks (1/1) / 2."""
    ranking = make_ranking([(0, "t", [(1, 0.9), (7, 0.8), (2, 0.7), (8, 0.6)], 20)])
    found = measures(ranking, make_queries([[1, 2, 3]], ["t"], [0]), ["mAP@5", "mAP@2"])["t"]
    assert found == {"mAP@5": pytest.approx((1 + 2 / 3) / 3), "mAP@2": pytest.approx(1 / 2), "queries": 1}


@pytest.mark.parametrize("seed", range(20))
def test_measures_are_those_of_one_query_at_a_time(seed):
    rng = np.random.default_rng(seed)
    queries = random_queries(rng)
    ranking = random_ranking(rng, queries)
    found = measures(ranking, queries, NAMES)
    for task, values in by_task_one_by_one(ranking, queries).items():
        expected = {name: float(np.mean(own)) for name, own in values.items()}
        assert found[task] == pytest.approx(expected | {"queries": len(values["R@1"])}, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_measures_are_trec_evals(seed):
    """trec_eval divides its map_cut by all relevant documents, CIRCO by no more than k."""
    trec = pytest.importorskip("pytrec_eval", reason="pip install pytrec_eval-terrier")
    rng = np.random.default_rng(seed)
    queries = make_queries(
        [rng.choice(30, rng.integers(1, 15), replace=False) for _ in range(40)], ["t"] * 40, range(40)
    )
    ranking = random_ranking(rng, queries, lost=0.0).filter(np.ones(40, bool))
    relevant = {str(n): {str(d): 1 for d in own.tolist()} for n, own in enumerate(queries.positives.lists())}
    run = {
        str(row["query"]): {str(document): -float(place) for place, document in enumerate(row["documents"])}
        for row in ranking.to_pylist()
        if row["documents"]
    }
    asked = {"success.1,5,10", "map_cut.5,10,25", "ndcg_cut.10"}
    scores = trec.RelevanceEvaluator(relevant, asked).evaluate(run)
    first = {query: dict(list(found.items())[:10]) for query, found in run.items()}
    ranks = trec.RelevanceEvaluator(relevant, {"recip_rank"}).evaluate(first)

    def mean(value) -> float:
        return sum(map(value, scores)) / queries.n

    expected = {f"R@{k}": mean(lambda q, k=k: scores[q][f"success_{k}"]) for k in (1, 5, 10)}
    expected |= {
        f"mAP@{k}": mean(lambda q, k=k: scores[q][f"map_cut_{k}"] * len(relevant[q]) / min(k, len(relevant[q])))
        for k in (5, 10, 25)
    }
    expected |= {
        "nDCG@10": mean(lambda q: scores[q]["ndcg_cut_10"]),
        "MRR@10": mean(lambda q: ranks[q]["recip_rank"]),
    }
    found = measures(ranking, queries, tuple(expected))["t"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)


def test_how_deep_metrics_look():
    assert depth_of(("accuracy", "R@3")) == 3
    assert depth_of(("mAP@50", "nDCG@10")) == 50
