"""Score fusion and the choice of its weight, on cases worked out by hand and one document at a time."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pytest

from tests.support.rankings import make_queries, make_ranking, random_queries, random_ranking, scores_one_by_one
from umarvel_ray.data.dataset import Queries
from umarvel_ray.recipe import Evaluate
from umarvel_ray.retrieve import fusion, metrics
from umarvel_ray.retrieve.fusion import WEIGHTS, answers_of, calibrate_weight, candidates_to_score, fuse_rankings
from umarvel_ray.retrieve.metrics import score_ranking

A, B, C, D, X, Y, Z = range(7)
Answers = Mapping[tuple[int, int], float]  # P(yes) by query and document


def ranking_of(rows: dict[int, list[tuple[int, float]]]) -> pa.Table:
    return make_ranking([(query, "t", found, 10) for query, found in rows.items()])


def scored(answers: Answers, candidates: pa.Table) -> pa.Table:
    """The table that the reranker returns; queries of which no document has an answer are quarantined."""
    rows = [
        row | {"rerank_scores": [answers.get((row["query"], document), 0.0) for document in row["documents"]]}
        for row in candidates.to_pylist()
        if any((row["query"], document) in answers for document in row["documents"])
    ]
    return pa.Table.from_pylist(rows, fusion.CANDIDATES.append(pa.field("rerank_scores", pa.large_list(pa.float32()))))


def test_fusion_by_hand():
    first = ranking_of({3: [(A, 0.9), (B, 0.8), (C, 0.5), (D, 0.4)]})
    answers = np.array([0.0, 0.5, 1.0, 1.0], np.float32)
    fused = fuse_rankings(first, answers, 0.5, top=3).to_pylist()[0]
    assert fused["documents"] == [B, C, A, D]  # 1.05, 1.0, 0.9; D is beyond `top`
    assert fused["scores"] == pytest.approx([1.05, 1.0, 0.9, 0.4])
    assert fuse_rankings(first, answers, 0.0, top=3).equals(first)


def test_ties_keep_their_order():
    first = ranking_of({0: [(Z, 0.5), (B, 0.5), (A, 0.25), (C, 0.25)], 1: [(C, 0.5), (A, 0.5)]})
    answers = np.array([0.0, 0.0, 0.25, 0.25, 0.0, 0.0], np.float32)
    assert [row["documents"] for row in fuse_rankings(first, answers, 1.0, 9).to_pylist()] == [[Z, B, A, C], [C, A]]


def test_weight_is_the_best_on_validation():
    validation = ranking_of({4: [(A, 0.9), (B, 0.8), (C, 0.5)], 5: [(X, 0.9), (Y, 0.6)]})
    answers = np.array([0.0, 0.9, 0.0, 0.0, 0.25], np.float32)  # query 4 needs w > 1/9, query 5 needs w < 1.2
    queries = make_queries([[B], [X]], ["t", "t"], [4, 5])
    settings = Evaluate(k=1)
    assert calibrate_weight(validation, answers, queries, settings, top=3) == 0.2
    assert score_ranking(fuse_rankings(validation, answers, 0.2, 3), queries, settings)["t"]["recall"] == 1.0


def test_candidates_are_joined_once():
    local = ranking_of({4: [(A, 0.9), (B, 0.8), (C, 0.5)], 9: [(X, 0.5)]})
    global_ranking = ranking_of({2: [(D, 0.1)], 4: [(Z, 0.95), (A, 0.9), (B, 0.8)]})
    joined = candidates_to_score([local, global_ranking], 2)
    assert joined["query"].to_pylist() == [4, 9, 2]
    assert joined["documents"].to_pylist() == [[A, B, Z], [X], [D]]
    assert joined["scores"].to_pylist()[0] == pytest.approx([0.9, 0.8, 0.95])
    table = scored({(4, A): 0.25, (4, B): 0.5, (4, Z): 0.75, (2, D): 1.0}, joined)
    assert answers_of(table, global_ranking).tolist() == [1.0, 0.75, 0.25, 0.5]
    assert answers_of(table, local).tolist() == [0.25, 0.5, 0.0, 0.0]
    assert answers_of(table.slice(0, 0), local).tolist() == [0.0] * 4


def candidates_one_by_one(rankings: Sequence[pa.Table], top: int) -> list[dict]:
    scores_of: dict[int, dict[int, float]] = {}
    for ranking in rankings:
        for row in ranking.to_pylist():
            known = scores_of.setdefault(row["query"], {})
            for document, score in list(zip(row["documents"], row["scores"], strict=True))[:top]:
                known.setdefault(document, score)
    return [
        {"query": query, "documents": list(known), "scores": list(known.values())} for query, known in scores_of.items()
    ]


def fused_one_by_one(ranking: pa.Table, answers: Answers, weight: float, top: int) -> pa.Table:
    rows = ranking.to_pylist()
    for row in rows:
        pairs = zip(row["documents"][:top], row["scores"][:top], strict=True)
        head = [(score + weight * answers.get((row["query"], document), 0.0), document) for document, score in pairs]
        head.sort(key=lambda pair: -pair[0])
        row["documents"][:top] = [document for _, document in head]
        row["scores"][:top] = [score for score, _ in head]
    return pa.Table.from_pylist(rows, ranking.schema)


def random_case(seed: int) -> tuple[Queries, list[pa.Table], Answers, int]:
    """Queries, two rankings of most of them, answers for some of their documents, and `top`."""
    rng = np.random.default_rng(seed)
    queries, top = random_queries(rng), int(rng.integers(1, 25))
    rankings = [random_ranking(rng, queries) for _ in range(2)]
    answered = {int(row) for row in queries.rows if rng.random() < 0.8}
    answers = {(query, document): int(rng.integers(0, 9)) / 8 for query in answered for document in range(30)}
    return queries, rankings, answers, top


@pytest.fixture(params=[1, 7, 16_384])
def block(request, monkeypatch):
    """Queries that are worked on at once."""
    for module in (fusion, metrics):
        monkeypatch.setattr(module, "BLOCK", request.param)


@pytest.mark.parametrize("seed", range(6))
def test_fusion_is_that_of_one_document_at_a_time(seed, block):
    queries, rankings, answers, top = random_case(seed)
    candidates = candidates_to_score(rankings, top)
    assert candidates.to_pylist() == candidates_one_by_one(rankings, top)
    table = scored(answers, candidates)
    for ranking in rankings:
        looked_up = answers_of(table, ranking)
        for weight in (0.0, 0.1, 2.0):
            expected = fused_one_by_one(ranking, answers, weight, top)
            assert fuse_rankings(ranking, looked_up, weight, top).equals(expected)

        def quality(weight: float, ranking: pa.Table = ranking) -> tuple[float, float, float]:
            fused = fused_one_by_one(ranking, answers, weight, top)
            tasks = scores_one_by_one(fused, queries, Evaluate(k=2)).values()
            # Rounded, because sums in another order may break a tie.
            return *(round(np.mean([task[name] for task in tasks]), 9) for name in ("recall", "ndcg@10")), -weight

        chosen = calibrate_weight(ranking, looked_up, queries, Evaluate(k=2), top)
        best = quality(max(WEIGHTS, key=quality))
        assert quality(chosen)[:2] == best[:2]
