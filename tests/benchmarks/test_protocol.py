"""The benchmarks' evaluation protocol: what must hold for any vectors, and the chances that were published."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.common.protocol import Protocol
from benchmarks.common.results import RESULTS
from umarvel_ray.data.dataset import Dataset, item_of
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.evaluate.results import SCOPES
from umarvel_ray.recipe import Data, load_recipe


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return open_dataset(Data(root="builtin:demo"))


@pytest.fixture(scope="module")
def protocol(dataset) -> Protocol:
    return Protocol(dataset, load_recipe("demo").evaluate, "test")


def test_chances_are_the_published_ones(protocol):
    peer = json.loads((RESULTS / "peer.json").read_text())
    assert protocol.chances() == {scope: pytest.approx(peer["chance"][scope]) for scope in SCOPES}
    assert {task: protocol.k(task) for task in protocol.tasks} == peer["k"]


def test_a_query_equal_to_its_positive_finds_it(protocol, dataset):
    documents = np.random.default_rng(0).normal(size=(len(protocol.documents), 64)).astype(np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    positives = dataset.queries("test").positives
    first = np.searchsorted(protocol.documents, positives.values[positives.offsets[:-1]])
    queries = {task: documents[first[positions]] for task, positions in protocol.tasks.items()}
    assert {scope: recall["average"] for scope, recall in protocol.recalls(queries, documents).items()} == {
        "local": 1.0,
        "global": 1.0,
    }
    apart = {task: -vectors for task, vectors in queries.items()}
    assert protocol.recalls(apart, documents)["local"]["average"] < 0.1


def test_items_are_those_of_the_vectors(protocol, dataset):
    items = protocol.document_items()
    assert len(items) == len(protocol.documents)
    assert items[7] == item_of(dataset.documents.rows(protocol.documents[7:8])[0])
    for task, positions in protocol.tasks.items():
        rows = dataset.queries("test").table.rows(dataset.queries("test").rows[positions])
        assert protocol.query_items(task) == [item_of(row) for row in rows]
        assert {row["task"] for row in rows} == {task}
