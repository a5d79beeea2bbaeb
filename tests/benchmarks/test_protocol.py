"""The benchmarks' evaluation protocol: what must hold for any vectors, and the chances that were published."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.common.protocol import Protocol
from benchmarks.common.results import RESULTS
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.evaluate.results import SCOPES
from umarvel_ray.recipe import Data, load_recipe


@pytest.fixture(scope="module")
def protocol() -> Protocol:
    return Protocol(open_dataset(Data(root="builtin:demo")), load_recipe("demo").evaluate, "test")


def test_chances_are_the_published_ones(protocol):
    peer = json.loads((RESULTS / "peer.json").read_text())
    assert protocol.chances() == {scope: pytest.approx(peer["chance"][scope]) for scope in SCOPES}
    assert {task: protocol.k(task) for task in protocol.queries} == peer["k"]


def test_a_query_equal_to_its_positive_finds_it(protocol):
    documents = np.random.default_rng(0).normal(size=(len(protocol.ids), 64)).astype(np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    row_of = {id_: row for row, id_ in enumerate(protocol.ids)}
    queries = {
        task: documents[[row_of[query["positive_ids"][0]] for query in rows]] for task, rows in protocol.queries.items()
    }
    assert {scope: recall["average"] for scope, recall in protocol.recalls(queries, documents).items()} == {
        "local": 1.0,
        "global": 1.0,
    }
    apart = {task: -vectors for task, vectors in queries.items()}
    assert protocol.recalls(apart, documents)["local"]["average"] < 0.1
