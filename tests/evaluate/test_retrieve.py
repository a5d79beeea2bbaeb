"""Evaluation, mining and reranking end to end on a small corpus, against plain numpy on the library's own vectors."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from umarvel_ray.data.tables import Dataset, item_of
from umarvel_ray.evaluate.checkpoints import evaluate_base, evaluate_checkpoint
from umarvel_ray.inference.embed import EmbedderGroup
from umarvel_ray.mining.mine import is_false_negative, mine
from umarvel_ray.model.checkpoint import save_checkpoint
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.recipe import Cluster, Evaluate, load_recipe
from umarvel_ray.retrieve.exact import ExactSearch
from umarvel_ray.retrieve.fusion import answers_of, calibrate_weight, candidates_to_score, fuse_rankings
from umarvel_ray.retrieve.metrics import score_ranking
from umarvel_ray.retrieve.rank import RANKING

DOCUMENT = [("id", pa.string()), ("text", pa.string()), ("image", pa.binary()), ("modality", pa.string()),
            ("source", pa.string()), ("concept", pa.string())]  # fmt: skip
QUERY = [*DOCUMENT, ("instruction", pa.string()), ("positive_ids", pa.list_(pa.string())), ("task", pa.string())]
COLOURS = ["red", "green", "blue", "white", "black", "yellow"]
THINGS = ["boat", "house", "tree", "fox", "bird", "flag", "pier"]


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_dataset() -> Dataset:
    """42 texts and 42 pictures; text → text, and picture → picture, where the query's own picture is in the pool."""
    documents, names = [], [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    for number, name in enumerate(names):
        common = {"source": "test", "concept": name}
        documents.append(common | {"id": f"t{number}", "text": f"A {name}.", "image": None, "modality": "text"})
        documents.append(common | {"id": f"p{number}", "text": None, "image": picture(number), "modality": "image"})
    # The same content twice: a gold's twin must not become a negative.
    documents.append(documents[0] | {"id": "twin"})
    queries = {"train": [], "validation": [], "test": []}
    for number, name in enumerate(names):
        split = ["train", "train", "validation", "test", "test"][number % 5]
        row = {"source": "test", "concept": name, "text": None, "image": None}
        queries[split].append(
            row | {"id": f"q{number}", "text": f"One {name} at dusk", "modality": "text", "task": "words_task1",
                   "instruction": "Find a text.", "positive_ids": [f"t{number}"]})  # fmt: skip
        queries[split].append(
            row | {"id": f"s{number}", "image": picture(number), "modality": "image", "task": "pictures_task4",
                   "instruction": "Find another picture.", "positive_ids": [f"p{(number + 7) % 42}"]})  # fmt: skip
    texts = [row["id"] for row in documents if row["modality"] == "text"]
    pictures = [row["id"] for row in documents if row["modality"] == "image"]
    pools = [
        {"task": task, "split": split, "document_ids": ids}
        for split in queries
        for task, ids in (("words_task1", texts), ("pictures_task4", pictures))
    ]
    tables = {name: pa.Table.from_pylist(rows, pa.schema(QUERY)) for name, rows in queries.items()}
    return Dataset(None, pa.Table.from_pylist(documents, pa.schema(DOCUMENT)), pa.Table.from_pylist(pools), tables.get)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return make_dataset()


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("demo", ["stage2.mining.depth=20", "evaluate.k=3", "evaluate.k_of={pictures_task4: 5}"])


@pytest.fixture(scope="module")
def pool(ray_cluster, recipe):
    with EmbedderGroup(Cluster(embedders=2, cpus_per_embedder=0.5, gpus_per_embedder=0), recipe.compute) as pool:
        yield pool


@pytest.fixture(scope="module")
def result(pool, dataset, recipe, tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluate_checkpoint(pool, dataset, recipe, tiny_base, "text", folder, settings=recipe.model)


@pytest.fixture(scope="module")
def checkpoint(recipe, tiny_base, tmp_path_factory):
    """The random base as a checkpoint of a run, with its settings."""
    folder = tmp_path_factory.mktemp("checkpoints") / "instruction"
    model = EmbeddingModel.from_pretrained(tiny_base, recipe.model)
    save_checkpoint(model, folder, recipe.model, {"phase": "instruction"})
    return folder


@pytest.fixture(scope="module")
def vectors(dataset, recipe, tiny_base):
    """id → vector, by the library's embedder."""
    embedder = Embedder.from_pretrained(tiny_base, settings=recipe.model)
    documents, queries = dataset.documents.to_pylist(), []
    for split in ("train", "validation", "test"):
        queries += dataset.queries(split).to_pylist()
    found = dict(
        zip([row["id"] for row in documents], embedder.encode_document([item_of(r) for r in documents]), strict=True)
    )
    return found | dict(
        zip([row["id"] for row in queries], embedder.encode_query([item_of(r) for r in queries]), strict=True)
    )


def expected_ranking(dataset, vectors, query: dict, ids: list[str]) -> list[str]:
    """Cosines sorted in numpy, the query's own picture left out."""
    images = dict(zip(dataset.documents["id"].to_pylist(), dataset.documents["image"].to_pylist(), strict=True))
    ids = [
        id_ for id_ in ids if query["image"] is None or images[id_] != query["image"] or id_ in query["positive_ids"]
    ]
    return sorted(ids, key=lambda id_: -float(vectors[query["id"]] @ vectors[id_]))


def assert_same_ranking(found: list[str], expected: list[str], vectors, query: dict) -> None:
    """Equal but for cosines that differ by less than fp32 can tell."""
    for mine_, theirs in zip(found, expected, strict=False):
        assert abs(float(vectors[query["id"]] @ (vectors[mine_] - vectors[theirs]))) < 1e-5


@pytest.mark.parametrize("scope", ["local", "global"])
def test_rankings_are_exact(result, dataset, vectors, scope):
    queries = {row["id"]: row for row in dataset.queries("test").to_pylist()}
    rows = result.ranking(scope).to_pylist()
    assert {row["query_id"] for row in rows} == set(queries)
    for row in rows:
        query = queries[row["query_id"]]
        ids = dataset.global_pool("test") if scope == "global" else dataset.pool(query["task"], "test")
        expected = expected_ranking(dataset, vectors, query, ids)
        assert row["pool_size"] == len(expected)
        assert_same_ranking(row["document_ids"], expected, vectors, query)
        assert row["document_ids"][:20] == sorted(set(row["document_ids"]), key=row["document_ids"].index)


def test_own_picture_is_not_retrieved_unless_asked(pool, result, dataset, recipe, tiny_base, tmp_path):
    own = {f"s{n}": f"p{n}" for n in range(42)}
    for row in result.ranking("global").to_pylist():
        assert own.get(row["query_id"]) not in row["document_ids"]
    keeping = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"drop_query_image": False})})
    other = evaluate_checkpoint(pool, dataset, keeping, tiny_base, "text", tmp_path, settings=recipe.model)
    rows = [row for row in other.ranking("local").to_pylist() if row["query_id"] in own]
    assert all(row["pool_size"] == 42 for row in rows)
    assert any(own[row["query_id"]] in row["document_ids"] for row in rows)


def test_recall_is_hits_over_queries_and_average_over_tasks(result, dataset):
    rows, positives = result.ranking("local").to_pylist(), {}
    for row in dataset.queries("test").to_pylist():
        positives[row["id"]] = row["positive_ids"][0]
    for task, k in (("words_task1", 3), ("pictures_task4", 5)):
        hits = [positives[row["query_id"]] in row["document_ids"][:k] for row in rows if row["task"] == task]
        assert result.local[task] == pytest.approx(sum(hits) / len(hits))
    assert result.local["average"] == pytest.approx((result.local["words_task1"] + result.local["pictures_task4"]) / 2)
    assert result.chance("local")["words_task1"] == pytest.approx(3 / 43)  # 42 texts and a twin
    assert result.chance("local")["pictures_task4"] == pytest.approx(5 / 41)  # its own picture is out


def test_a_finished_evaluation_is_read_back(result, pool, dataset, recipe, tiny_base):
    with EmbedderGroup(recipe.cluster, recipe.compute) as idle:
        again = evaluate_checkpoint(idle, dataset, recipe, tiny_base, "text", result.folder, settings=recipe.model)
        assert idle._actors == []
    assert again == result


def test_base_is_the_better_pooling(pool, dataset, recipe, tiny_base, tmp_path):
    best = evaluate_base(pool, dataset, recipe, tiny_base, tmp_path)
    both = {
        pooling: evaluate_checkpoint(
            pool, dataset, recipe, tiny_base, "base", tmp_path / pooling,
            settings=recipe.model.model_copy(update={"pooling": pooling}),
        ).local["average"]
        for pooling in ("mean", "last")
    }  # fmt: skip
    assert best.local["average"] == max(both.values())
    assert both[best.notes["pooling"]] == max(both.values())


def test_pair_scores_are_cosines(pool, result, vectors):
    search = ExactSearch(pool, result.folder / "test-documents")
    rows = np.array([3, 80, 41, 0, 60])
    queries = np.stack([vectors[f"q{n}"] for n in (3, 4, 8, 9, 13)])
    expected = [float(q @ vectors[search.ids[row]]) for q, row in zip(queries, rows, strict=True)]
    assert np.abs(search.pair_scores(queries, rows) - expected).max() < 1e-5


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("threshold", ["calibrate", 0.9])
def test_mined_negatives(pool, dataset, recipe, checkpoint, vectors, tmp_path, scope, threshold, capsys):
    change = {"pool": scope, "max_similarity": threshold, "margin": 0.01, "random_mix_of": {"pictures_task4": 1.0}}
    mining = recipe.stage2.mining.model_copy(update=change)
    recipe = recipe.model_copy(update={"stage2": recipe.stage2.model_copy(update={"mining": mining})})
    mined = mine(pool, dataset, recipe, checkpoint, tmp_path / "embeddings", tmp_path / "mined").to_pylist()
    printed = capsys.readouterr().out
    queries = dataset.queries("train").to_pylist()
    assert [row["query_id"] for row in mined] == [row["id"] for row in queries]
    twin_seen = any(row["query_id"] == "q0" and "twin" in row["document_ids"] for row in mined)
    assert ("true false negatives" in printed) == twin_seen
    seen, hardest = 0, {"words_task1": [], "pictures_task4": []}
    for row, query in zip(mined, queries, strict=True):
        ids = dataset.global_pool("train") if scope == "global" else dataset.pool(query["task"], "train")
        assert_same_ranking(row["document_ids"], expected_ranking(dataset, vectors, query, ids), vectors, query)
        gold = query["positive_ids"][0]
        positive = float(vectors[query["id"]] @ vectors[gold])
        for id_, score_, kept in zip(row["document_ids"], row["scores"], row["kept"], strict=True):
            assert score_ == pytest.approx(float(vectors[query["id"]] @ vectors[id_]), abs=1e-5)
            if kept:
                assert id_ != gold
                assert (id_, gold) not in {("twin", "t0"), ("t0", "twin")}
                assert score_ <= positive * 0.99 + 1e-5
                assert threshold == "calibrate" or score_ <= 0.9 + 1e-5
        assert len(row["negative_ids"]) == len(set(row["negative_ids"])) == recipe.stage2.train.hard_negatives
        own = row["query_id"].replace("s", "p")
        assert not {gold, own, *(["twin"] if gold == "t0" else [])} & set(row["negative_ids"])
        assert set(row["negative_ids"]) <= set(ids)
        seen += len(row["document_ids"])
        passed = [id_ for id_, kept in zip(row["document_ids"], row["kept"], strict=True) if kept]
        best = passed[: recipe.stage2.train.hard_negatives]
        hardest[row["task"]].append(row["negative_ids"][: len(best)] == best)
    assert all(hardest["words_task1"])
    assert not all(hardest["pictures_task4"]), "this task's are drawn at random"
    again = mine(pool, dataset, recipe, checkpoint, tmp_path / "embeddings", tmp_path / "mined").to_pylist()
    assert again == mined
    assert capsys.readouterr().out == ""
    assert f"{seen:,} candidates" in printed


def test_what_a_false_negative_is():
    query = {"concept": "fox", "modality": "text"}
    gold = [{"concept": "fox", "modality": "image"}]
    assert is_false_negative(query, {"concept": "fox", "modality": "image"}, gold)
    assert not is_false_negative(query, {"concept": "fox", "modality": "text"}, gold)
    assert not is_false_negative(query, {"concept": "owl", "modality": "image"}, gold)
    assert not is_false_negative(query | {"modality": "image,text"}, {"concept": "fox", "modality": "image"}, gold)
    assert not is_false_negative({"modality": "text"}, {"modality": "image"}, gold)


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
    assert fused["document_ids"] == ["b", "c", "a", "d"]  # 1.05, 1.0, 0.9; d is beyond the top
    assert fused["scores"] == pytest.approx([1.05, 1.0, 0.9, 0.4])
    assert fuse_rankings(first, answers, 0.0, top=3).equals(first)


def test_weight_is_the_best_on_validation():
    validation = ranking({"q": [("a", 0.9), ("b", 0.8), ("c", 0.5)], "r": [("x", 0.9), ("y", 0.6)]})
    answers = {("q", "b"): 0.9, ("r", "y"): 0.25}  # q needs w > 1/9, r is spoilt by w > 1.2
    positives = {"q": {"b"}, "r": {"x"}}
    settings = Evaluate(k=1)
    weight = calibrate_weight(validation, answers, positives, settings, top=3)
    assert weight == 0.2
    assert score_ranking(fuse_rankings(validation, answers, weight, 3), positives, settings, {})["t"]["recall"] == 1.0
    assert score_ranking(validation, positives, settings, {"t": ["lost"]})["t"]["recall"] == pytest.approx(1 / 3)


def test_candidates_are_joined_once():
    local = ranking({"q": [("a", 0.9), ("b", 0.8), ("c", 0.5)]})
    everywhere = ranking({"q": [("z", 0.95), ("a", 0.9), ("b", 0.8)]})
    joined = candidates_to_score([local, everywhere], 2).to_pylist()
    assert joined[0]["document_ids"] == ["a", "b", "z"]
    assert joined[0]["scores"] == pytest.approx([0.9, 0.8, 0.95])
    scored = pa.Table.from_pylist([joined[0] | {"rerank_scores": [0.1, 0.2, 0.3]}])
    assert answers_of(scored) == {("q", "a"): 0.1, ("q", "b"): 0.2, ("q", "z"): 0.3}
