"""Published benchmarks, measured on tiny folders: against plain numpy on the library's own vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.retrieve.test_measures import one_by_one
from tests.support.small_dataset import document_rows
from tests.support.suite_folders import FOLDERS
from umarvel_ray.data.dataset import Dataset, item_of
from umarvel_ray.errors import UserError
from umarvel_ray.evaluate.measured import mean_of, read_measured
from umarvel_ray.evaluate.suites import Model, Protocol, measure_suite, rerank_suite
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.ragged import Ragged
from umarvel_ray.retrieve.rank import OwnPictures, best_of_lists, read_ranking
from umarvel_ray.suites.registry import SUITES
from umarvel_ray.suites.suite import SPLIT, open_suite


@pytest.fixture(scope="module")
def embedder(tiny_base, recipe):
    return Embedder.from_pretrained(tiny_base, settings=recipe.model)


@pytest.fixture(scope="module")
def model(tiny_base, recipe):
    return Model("tiny", CheckpointRef.of(tiny_base, recipe.model))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens a benchmark's tiny folder."""
    root = tmp_path_factory.mktemp("suites")

    def opens(name: str, reference: bool = False) -> Dataset:
        if not (root / name).exists():
            FOLDERS[name](root / name)
        return open_suite(SUITES[name], root / name, root / "tables", reference)

    return opens


def queries_of(data: Dataset) -> list[dict]:
    queries = data.queries(SPLIT)
    return [{**row, "number": n} for n, row in enumerate(queries.table.rows(queries.rows))]


def candidates_of(data: Dataset, query: dict, drop: bool) -> np.ndarray:
    """Rows of the documents that a query may find, by comparing pictures one by one."""
    queries, documents = data.queries(SPLIT), document_rows(data)
    positives = set(queries.positives.at(query["number"]).tolist())
    if queries.galleries:
        return queries.galleries.at(query["number"])
    own = query["image"] if isinstance(query["image"], list) else [query["image"]]
    pool = data.pool(query["task"], SPLIT).tolist()
    hidden = {row for row in pool if drop and documents[row]["image"] in own and documents[row]["image"]} - positives
    return np.array([row for row in pool if row not in hidden])


def ranked(data: Dataset, embedder: Embedder, drop: bool) -> list[list[int]]:
    """Each query's candidates, best first."""
    vectors = embedder.encode_document([item_of(row) for row in document_rows(data)])
    found = []
    for query in queries_of(data):
        candidates = candidates_of(data, query, drop)
        scores = vectors[candidates] @ embedder.encode_query([item_of(query)])[0]
        positives = data.queries(SPLIT).positives.at(query["number"])
        order = np.lexsort((np.isin(candidates, positives), -scores))
        found.append(candidates[order].tolist())
    return found


def expected_scores(data: Dataset, rankings: list[list[int]], metrics: tuple[str, ...]) -> dict[str, dict[str, float]]:
    values: dict = {}
    for query, ranking in zip(queries_of(data), rankings, strict=True):
        positives = set(data.queries(SPLIT).positives.at(query["number"]).tolist())
        own = values.setdefault(query["task"], {name: [] for name in metrics})
        for name in metrics:
            own[name].append(one_by_one(name, ranking, positives))
    return {
        task: {name: float(np.mean(rows)) for name, rows in own.items()} | {"queries": len(own[metrics[0]])}
        for task, own in values.items()
    }


@pytest.mark.parametrize("name", FOLDERS)
def test_a_benchmark_is_measured_as_plain_numpy_does(embedders, embedder, model, opened, tmp_path, name):
    data, suite = opened(name), SUITES[name]
    measured = measure_suite(embedders, suite, data, model, tmp_path, Protocol())
    expected = expected_scores(data, ranked(data, embedder, drop=True), suite.metrics)
    found = measured.scores["local"]
    assert found.keys() == expected.keys()
    for task, numbers in expected.items():
        assert found[task] == pytest.approx(numbers, abs=1e-9)
    assert read_measured(tmp_path) == [measured]


def test_a_measured_benchmark_is_read_back(embedders, recipe, model, opened, tmp_path):
    first = measure_suite(embedders, SUITES["circo"], opened("circo"), model, tmp_path, Protocol())
    with EmbedderGroup(recipe.cluster, recipe.compute) as idle:
        assert measure_suite(idle, SUITES["circo"], opened("circo"), model, tmp_path, Protocol()) == first
        assert idle._actors == []


def test_the_reference_leaves_the_querys_picture_in_the_pool(embedders, embedder, model, opened, tmp_path):
    data = opened("circo", reference=True)
    measured = measure_suite(embedders, SUITES["circo"], data, model, tmp_path, Protocol(reference=True))
    rankings = ranked(data, embedder, drop=False)
    assert measured.notes == {"protocol": "reference"}
    assert [row["documents"] for row in read_ranking(tmp_path / "ranking-local").to_pylist()] == rankings
    assert {len(ranking) for ranking in rankings} == {6}
    ours = measure_suite(embedders, SUITES["circo"], opened("circo"), model, tmp_path / "ours", Protocol())
    assert {row["pool_size"] for row in read_ranking(tmp_path / "ours/ranking-local").to_pylist()} == {5}
    assert ours.identity != measured.identity


def test_vist_hides_the_pictures_that_were_seen_in_every_protocol(embedders, model, opened, tmp_path):
    data = opened("vist")
    measure_suite(embedders, SUITES["vist"], data, model, tmp_path, Protocol(reference=True))
    rows = read_ranking(tmp_path / "ranking-local").to_pylist()
    ids = data.document_ids.to_pylist()
    assert [{ids[row] for row in ranking["documents"]} for ranking in rows] == [{"e"}, {"a", "e"}]
    assert [ranking["pool_size"] for ranking in rows] == [1, 2]


def test_each_of_several_pictures_is_the_querys_own(opened):
    data = opened("multiturn-fashioniq")
    own = OwnPictures(data, data.queries(SPLIT), np.arange(data.documents.num_rows))
    ids = data.document_ids.to_pylist()
    assert [{ids[row] for row in rows} for rows in own.of(np.array([0, 1])).lists()] == [{"B001", "B002"}, {"B000"}]


def test_of_equal_scores_the_right_document_is_last():
    """A model that embeds everything alike finds nothing."""
    documents = Ragged.of([[5, 6], [7, 8, 9], []])
    relevant = np.array([True, False, False, True, False])
    scores, rows = best_of_lists(documents, np.full(5, 0.5, np.float32), relevant, 2)
    assert rows.tolist() == [[6, 5], [7, 9], [-1, -1]]
    assert scores[2].tolist() == [-np.inf, -np.inf]
    _, rows = best_of_lists(documents, np.array([0.5, 0.5, 0.1, 0.9, 0.2], np.float32), relevant, 2)
    assert rows.tolist() == [[6, 5], [8, 9], [-1, -1]]


def test_a_candidate_without_a_vector_is_not_ranked(embedders, model, tmp_path):
    FOLDERS["genecis"](tmp_path / "genecis")
    (tmp_path / "genecis/VG_100K_all/3.jpg").unlink()
    data = open_suite(SUITES["genecis"], tmp_path / "genecis", tmp_path / "tables")
    measure_suite(embedders, SUITES["genecis"], data, model, tmp_path / "out", Protocol())
    sizes = [row["pool_size"] for row in read_ranking(tmp_path / "out/ranking-local").to_pylist()]
    assert sizes == [3, 3, 3, 3, 2, 2]


@pytest.mark.parametrize("weight", [None, 0.7])
def test_reranking_fuses_with_each_tasks_weight(
    embedders, embedder, rerankers, reranker_ref, model, opened, tmp_path, weight
):
    """By default GeneCIS's object tasks with 1, the others with 0.1, as the reference."""
    data, suite, protocol = opened("genecis"), SUITES["genecis"], Protocol(weight=weight)
    alone = measure_suite(embedders, suite, data, model, tmp_path, protocol)
    ranking = read_ranking(tmp_path / "ranking-local")
    with_reranker = Model("judge", reranker_ref)
    found = rerank_suite(rerankers, suite, data, alone, ranking, with_reranker, tmp_path / "with", protocol)
    weights = {task: weight or (1.0 if "object" in task else 0.1) for task in data.queries(SPLIT).tasks}
    assert found.notes["weights"] == weights
    assert found.model == "tiny + judge"
    judge, rows = Reranker.from_pretrained(reranker_ref.path), document_rows(data)
    rankings = []
    for query, found_alone in zip(queries_of(data), ranking.to_pylist(), strict=True):
        documents = found_alone["documents"]
        answers = judge.score(item_of(query), [item_of(rows[row]) for row in documents])
        fused = np.array(found_alone["scores"]) + weights[query["task"]] * np.asarray(answers)
        rankings.append([documents[at] for at in np.argsort(-fused, kind="stable")])
    expected = expected_scores(data, rankings, suite.metrics)
    for task, numbers in expected.items():
        assert found.scores["local"][task] == pytest.approx(numbers)
    assert len(read_measured(tmp_path)) == 2


def test_a_weight_cannot_be_calibrated_without_validation_queries(opened):
    with pytest.raises(UserError, match="GeneCIS has no validation queries to calibrate on"):
        rerank_suite(None, SUITES["genecis"], opened("genecis"), None, None, None, Path(), Protocol(weight="calibrate"))


def test_scores_are_averaged_number_by_number():
    parts = [{"local": {"a": {"R@1": value, "queries": 4}}} for value in (0.25, 0.75)]
    assert mean_of(parts) == {"local": {"a": {"R@1": 0.5, "queries": 4}}}
