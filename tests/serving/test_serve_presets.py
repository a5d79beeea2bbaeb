"""The service with models of other systems: what it answers is what the library computes under their presets."""

import numpy as np
import pytest
from ray import serve

from tests.support.served import call, service_of
from umarvel_ray.errors import UserError
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.serving.app import build
from umarvel_ray.serving.settings import Service, from_environment

ITEMS = ["a red fox", "  two boats near a pier  "]


def service_with(base, **changes) -> Service:
    presets = {"preset": "gme", "reranker_preset": "lamra-rank"}
    models = {"embedder": str(base), "reranker": str(base), "index": None, "live": None}
    return service_of(base, **(models | presets | changes))


def test_vectors_and_scores_are_the_presets(tiny_base, address):
    serve.run(build(service_with(tiny_base)), name="presets", route_prefix="/")
    status, answer, _ = call(f"{address}/v1/embeddings", {"input": ITEMS})
    assert status == 200
    expected = Embedder.from_pretrained(tiny_base, preset="gme").encode_query(ITEMS)
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], expected, atol=1e-5)
    status, answer, _ = call(f"{address}/v1/rerank", {"query": "a fox", "documents": ITEMS})
    assert status == 200
    scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
    expected = Reranker.from_pretrained(tiny_base, preset="lamra-rank").score("a fox", ITEMS)
    np.testing.assert_allclose([scores[0], scores[1]], expected, atol=1e-5)


def test_the_environment_names_presets(tiny_base, monkeypatch):
    monkeypatch.setenv("UMARVEL_PRESET", "lamra-ret")
    monkeypatch.setenv("UMARVEL_RERANKER_PRESET", "")
    service = from_environment(service_with(tiny_base))
    assert (service.preset, service.reranker_preset) == ("lamra-ret", None)


def test_a_wrong_preset_is_refused_before_anything_starts(tiny_base):
    with pytest.raises(UserError, match="preset 'lamra-rank' is for a reranker"):
        build(service_with(tiny_base, preset="lamra-rank"))
