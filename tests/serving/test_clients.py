"""Bodies as the clients of other services send them, unchanged; the vectors and scores are the library's."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.support.served import call
from tests.support.tiny_run import picture
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.serving.auth import Keys
from umarvel_ray.serving.ingress import make_app
from umarvel_ray.serving.settings import Limits

PICTURE = picture(3)
TEXTS = ["a red fox", "two boats near a pier"]


@pytest.fixture(scope="module")
def vectors(service) -> np.ndarray:
    return Embedder.from_pretrained(service.embedder).encode_document(TEXTS)


@pytest.fixture(scope="module")
def p_yes(service) -> list[float]:
    return Reranker.from_pretrained(service.reranker).score("a fox", TEXTS).tolist()


def ok(url: str, route: str, body: dict | None = None) -> dict:
    status, response, _ = call(f"{url}{route}", body)
    assert status == 200, response
    return response


def embedded(response: dict) -> list:
    return [row.get("embedding", row.get("data")) for row in response["data"]]


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/embeddings", {"user": None, "encoding_format": None, "dimensions": None}),  # OpenAI
        ("/v1/embeddings", {"task": "retrieval.passage", "late_chunking": False, "embedding_type": "float",
                            "normalized": True}),  # Jina
        ("/v1/embeddings", {"truncate_prompt_tokens": 128, "add_special_tokens": True, "priority": 0}),  # vLLM
        ("/embeddings", {"dimensions": 0, "modality": "text"}),  # infinity
        ("/pooling", {"task": "embed"}),  # vLLM
    ],
)  # fmt: skip
def test_vectors_in_the_manner_of_openai(url, vectors, route, body):
    response = ok(url, route, {"input": TEXTS} | body)
    np.testing.assert_allclose(embedded(response), vectors, atol=1e-5)


def test_ignored_fields_are_named_in_a_header_unless_they_are_forbidden(url):
    _, _, headers = call(f"{url}/v1/embeddings", {"input": "a", "priority": 1, "logprobs": 2, "b\r\nx": 1})
    assert headers["x-ignored-fields"] == "logprobs, priority"
    _, _, headers = call(f"{url}/v1/embeddings", {"input": "a"})
    assert "x-ignored-fields" not in headers


def test_unknown_fields_can_be_forbidden():
    app = make_app(None, Limits(unknown_fields="forbid"), Keys())
    with TestClient(app) as client:
        response = client.post("/v1/embeddings", json={"input": "a", "dimensionz": 3})
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "body: unknown field 'dimensionz'"


def test_two_thousand_inputs_at_a_time(url, vectors):
    response = ok(url, "/v1/embeddings", {"input": TEXTS * 1024, "encoding_format": "base64"})
    found = np.array([np.frombuffer(base64.b64decode(one), "<f4") for one in embedded(response)])
    np.testing.assert_allclose(found, np.tile(vectors, (1024, 1)), atol=1e-5)


@pytest.mark.parametrize("tokens", [[1, 2, 3], [[1, 2], [3]]])
def test_token_ids_are_refused_in_one_clear_line(url, tokens):
    status, response, _ = call(f"{url}/v1/embeddings", {"input": tokens})
    assert status == 400
    assert response["error"]["message"].startswith("input: token ids are another model's; send text")


def test_late_chunking_is_refused(url):
    status, response, _ = call(f"{url}/v1/embeddings", {"input": "a", "late_chunking": True})
    assert (status, response["error"]["param"]) == (400, "late_chunking")


def test_chat_messages_may_end_with_an_empty_answer(url, vectors):
    turns = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": ""}]
    response = ok(url, "/v1/embeddings", {"messages": turns, "continue_final_message": True})
    np.testing.assert_allclose(embedded(response), vectors[:1], atol=1e-5)
    turns[1]["content"] = "a dog"
    assert call(f"{url}/v1/embeddings", {"messages": turns})[0] == 400


def test_one_model_by_its_name(url):
    assert ok(url, "/v1/models/distillation")["id"] == "distillation"
    assert call(f"{url}/v1/models/gpt")[0] == 404
    assert [model["id"] for model in ok(url, "/models")["data"]] == ["distillation", "reranker"]


def test_cohere_version_1(url, vectors):
    plain = ok(url, "/v1/embed", {"model": "distillation", "texts": TEXTS, "truncate": "END"})
    np.testing.assert_allclose(plain["embeddings"], vectors, atol=1e-5)
    assert plain["response_type"] == "embeddings_floats"
    typed = ok(
        url, "/v1/embed", {"texts": TEXTS, "input_type": "search_document", "embedding_types": ["int8", "float"]}
    )
    assert typed["response_type"] == "embeddings_by_type"
    small = np.array(typed["embeddings"]["int8"], float)
    assert np.abs(small).max(1).tolist() == [127, 127]
    assert ((small * vectors).sum(1) / np.linalg.norm(small, axis=1)).min() > 0.999


def test_cohere_version_2_in_small_types(url, vectors):
    kinds = ["int8", "uint8", "binary", "ubinary"]
    found = ok(url, "/v2/embed", {"texts": TEXTS, "input_type": "search_document", "embedding_types": kinds})[
        "embeddings"
    ]
    assert (np.array(found["uint8"]) - 128 == np.array(found["int8"])).all()
    assert (np.array(found["ubinary"]) - 128 == np.array(found["binary"])).all()
    assert (np.unpackbits(np.array(found["ubinary"], np.uint8), axis=1) == (vectors > 0)).all()


@pytest.mark.parametrize("route", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_a_thousand_documents_to_rerank(url, route, p_yes):
    body = {"model": "reranker", "query": "a fox", "documents": TEXTS * 500, "max_tokens_per_doc": 10, "priority": 1}
    response = ok(url, route, body)
    scores = {one["index"]: one["relevance_score"] for one in response["results"]}
    np.testing.assert_allclose([scores[i] for i in range(1000)], p_yes * 500, atol=1e-5)


def test_scores_of_many_pairs(url, p_yes):
    pairs = {"queries": ["a fox"] * 96, "documents": [TEXTS[i % 2] for i in range(96)]}
    for route in ("/v1/score", "/score"):
        data = ok(url, route, pairs)["data"]
        np.testing.assert_allclose([one["score"] for one in data], p_yes * 48, atol=1e-5)


def test_content_parts_in_score_and_rerank(url, p_yes):
    parts = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    query = {"content": "a fox"}
    for body in ({"data_1": query, "data_2": parts}, {"text_1": "a fox", "text_2": TEXTS}):
        np.testing.assert_allclose([one["score"] for one in ok(url, "/v1/score", body)["data"]], p_yes, atol=1e-5)
    results = ok(url, "/v1/rerank", {"query": query, "documents": parts, "return_documents": True})["results"]
    assert {one["document"]["text"]: one["relevance_score"] for one in results} == (
        pytest.approx(dict(zip(TEXTS, p_yes, strict=True)), abs=1e-5)
    )


def test_text_embeddings_inference(url, vectors, p_yes):
    np.testing.assert_allclose(ok(url, "/embed", {"inputs": TEXTS, "normalize": True}), vectors, atol=1e-5)
    np.testing.assert_allclose(ok(url, "/embed", {"inputs": TEXTS[0]}), vectors[:1], atol=1e-5)
    facts = ok(url, "/info")
    assert (facts["model_id"], facts["max_client_batch_size"]) == ("distillation", 2048)
    assert ok(url, "/version")["version"] == facts["version"]
    found = ok(url, "/rerank", {"query": "a fox", "texts": TEXTS, "raw_scores": True, "return_text": True})
    assert {one["text"]: one["score"] for one in found} == pytest.approx(
        {text: math.log(p / (1 - p)) for text, p in zip(TEXTS, p_yes, strict=True)}, abs=1e-4
    )


def written(picture: bytes) -> dict[str, str]:
    plain = base64.b64encode(picture).decode()
    return {
        "with line breaks": base64.encodebytes(picture).decode(),
        "of URLs": base64.urlsafe_b64encode(picture).decode(),
        "without padding": plain.rstrip("="),
        "without a type": f"data:;base64,{plain}",
        "with parameters": f"data:image/png;name=a.png;base64,{plain}",
        "in capitals": f"DATA:IMAGE/PNG;BASE64,{plain}",
        "of any kind": f"data:application/octet-stream;base64,{plain}",
    }


@pytest.mark.parametrize("form", written(PICTURE))
def test_pictures_in_every_base64(url, service, form):
    response = ok(url, "/v1/embeddings", {"input": [{"image": written(PICTURE)[form]}]})
    expected = Embedder.from_pretrained(service.embedder).encode_query([{"image": PICTURE}])
    np.testing.assert_allclose(embedded(response), expected, atol=1e-5)
