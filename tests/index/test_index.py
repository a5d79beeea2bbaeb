"""The faiss index against exact search in numpy, saved and reopened, and its errors."""

import numpy as np
import pytest

from umarvel_ray.errors import UserError
from umarvel_ray.index import build_index, make_index, open_index, recall_against_exact
from umarvel_ray.inference.embeddings import embedding_table
from umarvel_ray.inference.shards import close_output, open_output, write_shard


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [f"d{i}" for i in range(3000)], vectors, vectors[:40] + 0.1 * rng.normal(size=(40, 32)).astype(np.float32)


def exact_ids(ids, vectors, queries, k):
    order = np.argsort(-(queries @ vectors.T), axis=1)[:, :k]
    return [[ids[row] for row in line] for line in order]


def test_flat_is_exact_and_survives_saving(corpus, tmp_path):
    ids, vectors, queries = corpus
    index = make_index(ids, vectors)
    index.save(tmp_path)
    scores, found = open_index(tmp_path).search(queries, 10)
    assert found == exact_ids(ids, vectors, queries, 10)
    assert np.allclose(scores, -np.sort(-(queries @ vectors.T), axis=1)[:, :10], atol=1e-5)
    assert recall_against_exact(index, vectors, queries) == 1.0


def test_recall_of_an_approximate_index_is_counted_correctly(corpus):
    ids, vectors, queries = corpus
    index = make_index(ids, vectors, "IVF50,SQfp16")
    _, found = index.search(queries, 10)
    truth = exact_ids(ids, vectors, queries, 10)
    expected = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert recall_against_exact(index, vectors, queries) == pytest.approx(expected)
    assert 0.1 < expected < 1.0


def test_built_from_shards(corpus, tmp_path, capsys):
    ids, vectors, queries = corpus
    shards = tmp_path / "embeddings"
    open_output(shards, {"checkpoint": "the model's"}, 2)
    write_shard(shards, 0, embedding_table(range(2000), ids[:2000], vectors[:2000]), [])
    write_shard(shards, 1, embedding_table(range(2000, len(ids)), ids[2000:], vectors[2000:]), [("bad", "no picture")])
    close_output(shards, 3001)
    build_index(shards, tmp_path / "index", queries=queries)
    assert "recall@10 against exact search 1.0000" in capsys.readouterr().out
    assert open_index(tmp_path / "index").search(queries, 3)[1] == exact_ids(ids, vectors, queries, 3)
    assert open_index(tmp_path / "index").checkpoint == "the model's"


def test_k_larger_than_the_index(corpus):
    ids, vectors, queries = corpus
    scores, found = make_index(ids[:4], vectors[:4]).search(queries, 10)
    assert scores.shape == (40, 4)
    assert all(len(line) == 4 for line in found)


def test_errors_are_one_line(corpus, tmp_path):
    ids, vectors, _ = corpus
    with pytest.raises(UserError, match="holds no index"):
        open_index(tmp_path)
    with pytest.raises(UserError, match="does not know"):
        make_index(ids, vectors, "Nonsense")
    with pytest.raises(UserError, match="nothing to index"):
        make_index([], vectors[:0])
    with pytest.raises(UserError, match="dimension 32"):
        make_index(ids, vectors).search(vectors[:, :8], 1)
    make_index(ids, vectors).save(tmp_path)
    (tmp_path / "index.faiss").write_bytes((tmp_path / "index.faiss").read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        open_index(tmp_path)
    (tmp_path / "ids.json").write_text('["only one"]')
    make_index(ids, vectors).save(tmp_path / "other")
    (tmp_path / "other" / "ids.json").write_text('{"checkpoint": null, "ids": ["only one"]}')
    with pytest.raises(UserError, match="1 ids for 3000"):
        open_index(tmp_path / "other")


@pytest.mark.parametrize("factory", ["IVF4096,Flat", "PQ8", "IVF64,PQ8"])
def test_too_few_documents_for_a_kind_of_index_are_one_line(factory):
    vectors = np.eye(16, dtype=np.float32)
    with pytest.raises(UserError, match=rf"16 documents are too few to train the faiss index '{factory}'; try Flat"):
        make_index([str(n) for n in range(16)], vectors, factory)
