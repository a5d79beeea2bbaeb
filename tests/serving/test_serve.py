"""The HTTP service over real sockets, from other processes: it returns what the library computes, and clear errors."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ray import serve

from tests.conftest import REPO
from tests.support.served import call
from tests.support.tiny_run import TEXTS, picture
from umarvel_ray.errors import UserError
from umarvel_ray.model.checkpoint import CheckpointRef
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker
from umarvel_ray.search import search_run
from umarvel_ray.serving.app import build
from umarvel_ray.serving.auth import Keys
from umarvel_ray.serving.ingress import Ingress
from umarvel_ray.serving.replicas import SLOT_TOKENS, SLOTS, EmbedderDeployment, batch_slots

PNG = base64.b64encode(picture(1)).decode()
PNG_URI = f"data:image/png;base64,{PNG}"
INSTRUCTION = "Find an image that matches the caption."
# One request per form of input: (what the client sends, the items for the library, side).
FORMS = [
    ("a red fox", ["a red fox"], "query"),
    (["a red fox", "two boats near a pier"], ["a red fox", "two boats near a pier"], "document"),
    ([{"text": "a red fox", "instruction": INSTRUCTION}], [{"text": "a red fox", "instruction": INSTRUCTION}], "query"),
    ([{"image": f"data:image/png;base64,{PNG}"}], [{"image": picture(1)}], "document"),
    (
        [{"image": PNG, "text": "at dusk", "instruction": INSTRUCTION}, "a small blue bird"],
        [{"image": picture(1), "text": "at dusk", "instruction": INSTRUCTION}, "a small blue bird"],
        "query",
    ),
]
CLIENT = """
import json, sys
import cohere
from openai import OpenAI
url, forms, texts, image = json.load(sys.stdin)
client = OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
responses = []
for given, _, side in forms:
    for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        response = client.embeddings.create(model="distillation", input=given, extra_body={"input_type": side}, **form)
        rows = [[row.index, row.embedding] for row in response.data]
        responses.append([rows, response.usage.total_tokens])
shorter = client.embeddings.create(model="distillation", input=texts, dimensions=8).data
co = cohere.ClientV2(api_key="none", base_url=url)
kinds = ["float", "ubinary"]
embedded = co.embed(model="distillation", texts=texts, input_type="search_document", embedding_types=kinds)
part = {"type": "image_url", "image_url": {"url": image}}
fused = [{"content": [{"type": "text", "text": texts[0]}, part]}]
fused = co.embed(model="distillation", inputs=fused, input_type="search_query", embedding_types=["float"])
best = co.rerank(model="reranker", query=texts[0], documents=texts, top_n=2)
print(json.dumps({
    "openai": responses,
    "models": [model.id for model in client.models.list().data],
    "shorter": [row.embedding for row in shorter],
    "cohere": [embedded.embeddings.float_, embedded.embeddings.ubinary, fused.embeddings.float_],
    "rerank": [[one.index, one.relevance_score] for one in best.results],
}))
"""


@pytest.fixture(scope="module")
def embedder(service):
    return Embedder.from_pretrained(service.embedder)


def expected(embedder: Embedder, items: list, side: str) -> np.ndarray:
    return embedder.encode_query(items) if side == "query" else embedder.encode_document(items)


@pytest.fixture(scope="module")
def clients(url) -> dict:
    """What the official OpenAI and Cohere clients receive, in another process."""
    client = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps([url, [[given, None, side] for given, _, side in FORMS], TEXTS, PNG_URI]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert client.returncode == 0, client.stderr
    return json.loads(client.stdout)


def test_the_openai_client_gets_the_vectors_of_the_library(clients, embedder):
    assert clients["models"] == ["distillation", "reranker"]
    for number, (rows, tokens) in enumerate(clients["openai"]):
        _, items, side = FORMS[number // 3]
        indices, vectors = zip(*rows, strict=True)
        if number % 3 == 2:  # an explicit base64 request is passed through undecoded
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        np.testing.assert_allclose(vectors, expected(embedder, items, side), atol=1e-5)
        assert indices == tuple(range(len(items)))
        assert tokens == sum(embedder.encoder.encode(item, side).length for item in items)
    first = embedder.encode_query(TEXTS)[:, :8]
    np.testing.assert_allclose(clients["shorter"], first / np.linalg.norm(first, axis=1, keepdims=True), atol=1e-5)


def test_the_cohere_client_gets_the_vectors_and_scores_of_the_library(clients, service, embedder):
    floats, bits, fused = clients["cohere"]
    vectors = embedder.encode_document(TEXTS)
    np.testing.assert_allclose(floats, vectors, atol=1e-5)
    assert np.array_equal(np.unpackbits(np.array(bits, np.uint8), axis=1)[:, : vectors.shape[1]], vectors > 0)
    both = {"text": TEXTS[0], "image": picture(1)}
    np.testing.assert_allclose(fused, embedder.encode_query([both]), atol=1e-5)
    scores = Reranker.from_pretrained(service.reranker).score(TEXTS[0], TEXTS)
    order = np.argsort(-scores)[:2].tolist()
    assert [index for index, _ in clients["rerank"]] == order
    np.testing.assert_allclose([score for _, score in clients["rerank"]], scores[order], atol=1e-5)


def test_chat_messages_are_items(url, embedder):
    content = [{"type": "text", "text": "at dusk"}, {"type": "image_url", "image_url": {"url": PNG_URI}}]
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": content}]
    status, response, _ = call(f"{url}/v1/embeddings", {"messages": messages})
    assert status == 200
    item = {"text": "at dusk", "image": picture(1), "instruction": INSTRUCTION}
    np.testing.assert_allclose(response["data"][0]["embedding"], embedder.encode_query([item])[0], atol=1e-5)
    for bad in ([*messages, messages[1]], messages[:1]):
        assert call(f"{url}/v1/embeddings", {"messages": bad})[0] == 400


def test_several_pictures_and_the_cache(url, embedder):
    """A cached vector equals the first one; another order of pictures is another item."""
    images = [base64.b64encode(picture(seed)).decode() for seed in (1, 2)]
    for order in (1, 1, -1, 1):
        status, response, _ = call(f"{url}/v1/embeddings", {"input": {"text": "both", "image": images[::order]}})
        assert status == 200
        item = {"text": "both", "image": [picture(seed) for seed in (1, 2)[::order]]}
        np.testing.assert_allclose(response["data"][0]["embedding"], embedder.encode_query([item])[0], atol=1e-5)


def test_bad_items_can_be_skipped(url, embedder, service):
    items = ["a red fox", {"image": "cat.png"}, "two boats", {"image": PNG[:80]}, ""]
    status, response, _ = call(f"{url}/v1/embeddings", {"input": items, "on_error": "skip"})
    assert status == 200
    assert [row["index"] for row in response["data"]] == [0, 2]
    assert [error["index"] for error in response["errors"]] == [1, 3, 4]
    vectors = [row["embedding"] for row in response["data"]]
    np.testing.assert_allclose(vectors, embedder.encode_query(["a red fox", "two boats"]), atol=1e-5)
    _, response, _ = call(f"{url}/v1/rerank", {"query": "a", "documents": items, "on_error": "skip"})
    scores = Reranker.from_pretrained(service.reranker).score("a", ["a red fox", "two boats"])
    found = {result["index"]: result["relevance_score"] for result in response["results"]}
    np.testing.assert_allclose([found[0], found[2]], scores, atol=1e-5)


def test_score_is_p_yes_or_cosine(url, service, embedder):
    reranker = Reranker.from_pretrained(service.reranker)
    queries, documents = ["a boat", {"image": PNG}], ["two boats", "a fox"]
    library = ["a boat", {"image": picture(1)}]
    _, one, _ = call(f"{url}/v1/score", {"queries": queries[0], "documents": documents})
    np.testing.assert_allclose([row["score"] for row in one["data"]], reranker.score("a boat", documents), atol=1e-5)
    _, pairs, _ = call(f"{url}/v1/score", {"text_1": queries, "text_2": documents})
    wanted = [reranker.score(query, [document])[0] for query, document in zip(library, documents, strict=True)]
    np.testing.assert_allclose([row["score"] for row in pairs["data"]], wanted, atol=1e-5)
    body = {"queries": queries, "documents": documents, "model": "distillation"}
    cosines = (embedder.encode_query(library) * embedder.encode_document(documents)).sum(1)
    np.testing.assert_allclose([r["score"] for r in call(f"{url}/v1/score", body)[1]["data"]], cosines, atol=1e-5)
    assert call(f"{url}/v1/score", {"queries": ["a", "b"], "documents": ["a", "b", "c"]})[0] == 400


def test_every_metric_on_the_dashboard_exists(url):
    """/metrics has every series that serve/grafana.json plots, after some requests and an error."""
    call(f"{url}/v1/embeddings", {"input": "counted once"})
    call(f"{url}/v1/embeddings", {"input": []})
    plotted = set(re.findall(r"ray_\w+", (REPO / "serve" / "grafana.json").read_text()))
    assert len(plotted) >= 10
    for _ in range(60):  # Ray's agents collect at intervals
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
            page = response.read().decode()
        missing = plotted - set(re.findall(r"^(ray_\w+)[{ ]", page, re.MULTILINE))
        if not missing:
            break
        time.sleep(0.5)
    assert not missing
    assert re.search(r'^ray_umarvel_items_total\S*source="model"\S* \d', page, re.MULTILINE)


def test_requests_that_share_a_batch_get_their_own_vectors(url, embedder):
    texts = [" ".join(TEXTS[: 1 + i % 5]) + f" {i}" for i in range(48)]
    with ThreadPoolExecutor(48) as pool:
        responses = list(pool.map(lambda text: call(f"{url}/v1/embeddings", {"input": text}), texts))
    assert [status for status, _, _ in responses] == [200] * len(texts)
    vectors = [response["data"][0]["embedding"] for _, response, _ in responses]
    np.testing.assert_allclose(vectors, embedder.encode_query(texts), atol=1e-5)


def test_a_request_larger_than_a_batch(url, embedder):
    texts = [f"{' '.join(TEXTS)} {i}" for i in range(96)]
    assert sum(embedder.encoder.encode(text, "query").length for text in texts) > SLOTS * SLOT_TOKENS
    status, response, _ = call(f"{url}/v1/embeddings", {"input": texts})
    assert status == 200
    vectors = [row["embedding"] for row in response["data"]]
    np.testing.assert_allclose(vectors, embedder.encode_query(texts), atol=1e-5)


def test_a_request_of_many_megabytes_reaches_the_model(url, embedder):
    """By default, gRPC between deployments carries 4 MiB."""
    pictures = [picture(seed, (80, 80)) for seed in range(8)]
    items = [{"image": pictures, "text": f"{i}"} for i in range(48)]
    encoded = [embedder.encoder.encode(item, "query") for item in items]
    assert sum(part.pixels.nbytes for item in encoded for part in item.pictures) > 4 * 2**20
    uris = [f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in pictures]
    status, response, _ = call(f"{url}/v1/embeddings", {"input": [item | {"image": uris} for item in items]})
    assert status == 200
    vectors = [row["embedding"] for row in response["data"]]
    np.testing.assert_allclose(vectors, embedder.encode_query(items), atol=1e-5)


def test_batches_are_measured_in_tokens(embedder):
    short, long = (embedder.encoder.encode(text, "query") for text in ("a", " ".join(TEXTS * 2)))
    assert short.length < SLOT_TOKENS < long.length <= 2 * SLOT_TOKENS
    assert batch_slots([[short], [long], [long]]) == 1 + 2 + 2
    assert batch_slots([[long] * SLOTS]) == SLOTS
    assert batch_slots([[short]] * (SLOTS + 1)) == SLOTS + 1


def test_rerank_equals_the_library(url, service):
    query = {"text": "a boat", "instruction": INSTRUCTION}
    documents = ["two boats", {"image": PNG}, {"text": "dusk", "image": f"data:image/png;base64,{PNG}"}, "a fox"]
    items = ["two boats", {"image": picture(1)}, {"text": "dusk", "image": picture(1)}, "a fox"]
    reranker = Reranker.from_pretrained(service.reranker)
    scores = reranker.score(query, items)
    body = {"query": query, "documents": documents, "return_documents": True}
    status, response, _ = call(f"{url}/v1/rerank", body)
    assert status == 200
    order = [result["index"] for result in response["results"]]
    assert order == np.argsort(-scores).tolist()
    np.testing.assert_allclose([result["relevance_score"] for result in response["results"]], scores[order], atol=1e-5)
    wanted = [{"text": item} if isinstance(item, str) else item for item in documents]
    assert [result["document"] for result in response["results"]] == [wanted[index] for index in order]
    _, first, _ = call(f"{url}/v1/rerank", body | {"top_n": 2, "return_documents": False})
    assert [sorted(result) for result in first["results"]] == [["index", "relevance_score"]] * 2
    assert [result["index"] for result in first["results"]] == order[:2]
    prompt = reranker.encoder.encode_query(query).length
    tokens = sum(prompt + reranker.encoder.encode_document(item).length for item in items)
    assert first["usage"] == response["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_an_instruction_that_leaves_no_room_for_the_text_is_refused_everywhere(url):
    query = {"text": "a boat", "instruction": "find it " * 300}
    bodies = {
        "embeddings": {"input": [query]},
        "rerank": {"query": query, "documents": ["two boats"]},
        "score": {"queries": query, "documents": ["two boats"]},
        "search": {"query": query, "rerank": True},
    }
    for route, body in bodies.items():
        status, response, _ = call(f"{url}/v1/{route}", body)
        assert (status, "leaves no room for a text within max_text_tokens" in response["error"]["message"]) == (
            400,
            True,
        )


@pytest.mark.parametrize("rerank", [False, True])
def test_search_equals_the_library(url, run, rerank):
    query = {"text": "a bird on a boat", "instruction": INSTRUCTION}
    body = {"query": query, "top_k": 4, "rerank": rerank, "return_documents": True}
    status, response, _ = call(f"{url}/v1/search", body)
    assert status == 200
    hits = search_run(run, query, top_k=4, rerank=rerank)
    assert [result["id"] for result in response["results"]] == [hit.document["id"] for hit in hits]
    np.testing.assert_allclose([r["score"] for r in response["results"]], [hit.score for hit in hits], atol=1e-5)
    for result, hit in zip(response["results"], hits, strict=True):
        assert result["document"]["text"] == hit.document["text"]
        image = result["document"]["image"]
        assert (base64.b64decode(image.split(",")[1]) if image else None) == hit.document["image"]
        assert (result["rerank_score"] is None) != rerank
    assert response["timings"]["encode_ms"] > 0
    assert (response["timings"]["rerank_ms"] > 1) == rerank


def test_a_picture_finds_itself(url):
    body = {"query": {"image": base64.b64encode(picture(3)).decode()}, "top_k": 1}
    _, response, _ = call(f"{url}/v1/search", body)
    assert response["results"][0]["id"] == "i3"
    assert response["results"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_added_documents_are_found_and_deleted_ones_are_not(url, embedder):
    _, before, _ = call(f"{url}/v1/index")
    documents = [
        {"id": "n1", "text": "a lantern on a hill", "source": "notes"},
        {"id": "n2", "image": PNG_URI},
        {"id": "t0", "text": "a kite above the roofs", "source": "notes"},  # replaces a document of the corpus
        {"id": "bad", "image": PNG[:80]},
        {"id": "n3", "image": [base64.b64encode(picture(2)).decode(), PNG]},
    ]
    status, response, _ = call(f"{url}/v1/index", {"documents": documents})
    assert (status, response["error"]["index"]) == (400, 3)
    status, added, _ = call(f"{url}/v1/index", {"documents": documents, "on_error": "skip"})
    assert (status, added["added"], added["replaced"], added["errors"][0]["index"]) == (200, 3, 1, 3)
    body = {"query": "a kite above the roofs", "top_k": 20, "after": added["sequence"], "return_documents": True}
    _, response, _ = call(f"{url}/v1/search", body)
    found = {result["id"]: result for result in response["results"]}
    assert len(found) == before["documents"] + 3 == call(f"{url}/v1/index")[1]["documents"]
    assert response["results"][0]["id"] == "t0"
    [query], vectors = embedder.encode_query([body["query"]]), embedder.encode_document(["a lantern on a hill"])
    assert found["n1"]["score"] == pytest.approx(float(vectors[0] @ query), abs=1e-5)
    assert base64.b64decode(found["n2"]["document"]["image"].split(",")[1]) == picture(1)
    assert (found["n1"]["image_url"], found["n2"]["image_url"]) == (None, "/v1/documents/n2/image")
    with urllib.request.urlopen(url + found["n2"]["image_url"]) as response:
        assert (response.headers["content-type"], response.read()) == ("image/png", picture(1))
        assert response.headers["x-content-type-options"] == "nosniff"
    uris = found["n3"]["document"]["image"]
    assert [base64.b64decode(uri.split(",")[1]) for uri in uris] == [picture(2), picture(1)]
    several = embedder.encode_document([{"image": [picture(2), picture(1)]}])
    assert found["n3"]["score"] == pytest.approx(float(several[0] @ query), abs=1e-5)
    for address, content in zip(found["n3"]["image_urls"], (picture(2), picture(1)), strict=True):
        with urllib.request.urlopen(url + address) as response:
            assert response.read() == content
    assert call(f"{url}/v1/documents/n3/image?n=2")[0] == 404
    assert call(f"{url}/v1/documents/n3/image?n=-1")[0] == 400
    assert call(f"{url}/v1/documents/n1/image")[0] == call(f"{url}/v1/documents/no/body/image")[0] == 404
    _, notes, _ = call(f"{url}/v1/search", body | {"filter": {"source": ["notes"], "modality": ["text"]}})
    assert {result["id"] for result in notes["results"]} == {"n1", "t0"}

    labelled = {"id": "n1", "text": "a lantern on a hill", "source": "notes", "metadata": {"tenant": "é", "year": 2024}}
    _, again, _ = call(f"{url}/v1/index", {"documents": [labelled]})
    body["after"] = again["sequence"]
    for metadata, ids in [
        ({"tenant": ["é", "other"], "year": [2024]}, {"n1"}),
        ({"tenant": ["é"], "year": ["2024"]}, set()),
        ({"tenant": ["e"]}, set()),
        ({}, found.keys()),
    ]:
        _, response, _ = call(f"{url}/v1/search", body | {"filter": {"metadata": metadata}})
        assert {result["id"] for result in response["results"]} == ids
    assert 0 <= call(f"{url}/v1/index")[1]["behind_s"] < 60

    _, deleted, _ = call(f"{url}/v1/index/delete", {"ids": ["n1", "n2", "n3", "nobody"]})
    assert (deleted["deleted"], deleted["unknown"]) == (3, ["nobody"])
    restored = {"documents": [{"id": "t0", "text": TEXTS[0], "source": "tiny"}]}
    _, last, _ = call(f"{url}/v1/index", restored)
    _, response, _ = call(f"{url}/v1/search", body | {"after": last["sequence"]})
    assert {result["id"] for result in response["results"]} == found.keys() - {"n1", "n2", "n3"}
    status, response, _ = call(f"{url}/v1/search", body | {"after": last["sequence"] + 1})
    assert (status, response["error"]["param"]) == (409, "after")
    assert f"is at commit {last['sequence']}" in response["error"]["message"]


@pytest.mark.parametrize(
    "header", ["X-Request-ID", "X-Session-ID", "Serve-Multiplexed-Model-ID", "X-Request-Disconnect-Disabled"]
)
def test_headers_that_are_not_text_are_dropped(url, header):
    """Serve's proxy itself reads these headers, before any route."""
    status, response, headers = call(f"{url}/v1/embeddings", {"input": "a red fox"}, **{header: "\xff"})
    assert (status, len(response["data"])) == (200, 1)
    assert headers["X-Request-ID"].isalnum() or uuid.UUID(headers["X-Request-ID"])


def test_health_when_ready(url):
    assert call(f"{url}/health")[:2] == (200, {"status": "ok", "waiting_for": []})


@pytest.mark.parametrize(
    ("route", "body", "param", "index"),
    [
        ("embeddings", {"input": ["fine", {"image": "https://example.org/cat.png"}]}, "input[1].image", 1),
        ("embeddings", {"input": [{"image": "/etc/hostname"}]}, "input[0].image", 0),
        ("embeddings", {"input": [{"image": "file:///etc/hostname"}]}, "input[0].image", 0),
        ("embeddings", {"input": ["a", "b", {"image": "data:text/plain;base64,aGk="}]}, "input[2].image", 2),
        ("embeddings", {"input": ["a", {"image": base64.b64encode(picture(1)[:60]).decode()}]}, "input[1]", 1),
        ("embeddings", {"input": ["a", {"text": "b", "color": "red"}]}, "input[1].color", 1),
        ("embeddings", {"input": ["a", ""]}, "input[1]", 1),
        ("embeddings", {"input": [[1, 2, 3]]}, "input", None),
        ("embeddings", {"input": ["a", {"image": 3}]}, "input[1].image", 1),
        ("embeddings", {"input": {"image": ["", 3]}}, "input.image[1]", 1),
        ("embeddings", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", 0),
        ("embeddings", {"messages": [{"role": "user", "content": [{"type": "gif"}]}]}, "messages[0].content[0]", 0),
        ("embeddings", {"input": ["a", {}]}, "input[1]", 1),
        ("embeddings", {"input": [{"text": "a", "instruction": "b"}], "input_type": "document"}, "input[0]", 0),
        ("embeddings", {"input": "\ud800"}, "input.text", None),
        ("embeddings", {"input": ["a"] * 2049}, "input", None),
        ("embeddings", {"input": ["word " * 6000] * 150}, "input", None),
        ("embeddings", {"input": {"image": ["http://a"] * 9999}}, "input.image", None),
        ("embeddings", {"input": [{"image": "http://a"}] * 257}, "input", None),
        ("embeddings", {"input": "a", "dimensions": -1}, "dimensions", None),
        ("embeddings", b"{not json", "body", None),
        ("rerank", {"query": "a", "documents": ["a", {"image": "cat.png"}]}, "documents[1].image", 1),
        ("rerank", {"query": {"image": "cat.png"}, "documents": ["a"]}, "query.image", None),
        ("rerank", {"query": "a", "documents": [{"text": "a", "instruction": "b"}]}, "documents[0]", 0),
        ("search", {"query": {"image": "ftp://example.org/cat.png"}}, "query.image", None),
        ("search", {"query": "a", "top_k": 0}, "top_k", None),
        ("search", {"query": "a", "filter": {"metadata": {"year": [2.5]}}}, "filter.metadata.year[0]", 0),
        ("search", {"query": "a", "filter": {"metadata": {"year": []}}}, "filter.metadata.year", None),
        ("search", {"query": "a", "filter": {"language": ["en"]}}, "filter.language", None),
        (
            "index",
            {"documents": [{"id": "a", "text": "a", "metadata": {"year": True}}]},
            "documents[0].metadata.year",
            0,
        ),
        ("index", {"documents": [{"id": "a", "text": "a", "metadata": {"a": 2**63}}]}, "documents[0].metadata.a", 0),
    ],
)
def test_the_error_locates_the_bad_item(url, route, body, param, index):
    status, response, _ = call(f"{url}/v1/{route}", body)
    assert status == 400
    assert (response["error"]["param"], response["error"]["index"]) == (param, index)
    assert response["error"]["type"] == "invalid_request_error"
    assert "\n" not in response["error"]["message"]


def test_a_model_that_is_not_served(url):
    status, response, _ = call(f"{url}/v1/embeddings", {"input": "a", "model": "gpt"})
    assert status == 404
    assert "'distillation'" in response["error"]["message"]


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Late:
    """Takes the place of the reranker; starts once the file `gate` exists."""

    def __init__(self, gate: str) -> None:
        while not Path(gate).exists():
            time.sleep(0.05)


def test_startup_overload_and_missing_components(url, service, embedder, tmp_path):
    """A second application: a deployment that starts late, no index, and an embedder with room for two requests."""
    reranker, service = service.reranker, service.model_copy(update={"reranker": None, "index": None, "live": None})
    small = EmbedderDeployment.options(num_replicas=1, max_ongoing_requests=1, max_queued_requests=1)
    checkpoints = {"embedder": CheckpointRef.of(service.embedder), "reranker": CheckpointRef.of(reranker)}
    model = small.bind(checkpoints["embedder"], service.runtime)
    late = Late.bind(str(tmp_path / "gate"))
    app = Ingress.bind(
        service, Keys(), checkpoints=checkpoints, embedder=model, reranker=late, search=None, writer=None
    )
    target = serve.RunTarget(target=app, name="small", route_prefix="/small")
    serve.run_many([target], wait_for_applications_running=False)

    states = health_until(
        f"{url}/small", lambda status, response: response == {"status": "starting", "waiting_for": ["Late"]}
    )
    assert 200 not in states
    (tmp_path / "gate").touch()
    health_until(f"{url}/small", lambda status, response: status == 200)

    texts = [f"{' '.join(TEXTS)} {i}" for i in range(96)]
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda _: call(f"{url}/small/v1/embeddings", {"input": texts}), range(16)))
    assert {status for status, _, _ in responses} == {200, 503}
    vectors = embedder.encode_query(texts)
    for status, response, headers in responses:
        if status == 200:
            np.testing.assert_allclose([row["embedding"] for row in response["data"]], vectors, atol=1e-5)
        else:
            assert int(headers["Retry-After"]) >= 1
            assert response["error"]["type"] == "overloaded"
    assert call(f"{url}/small/v1/embeddings", {"input": texts[:1]})[0] == 200

    status, response, _ = call(f"{url}/small/v1/search", {"query": "a"})
    assert status == 404
    assert "UMARVEL_INDEX" in response["error"]["message"]
    serve.delete("small")


def health_until(url: str, reached: Callable[[int, dict], bool]) -> set[int]:
    """Poll /health until `reached` is true; returns the statuses seen on the way."""
    seen = set()
    for _ in range(600):
        try:
            status, response, _ = call(f"{url}/health")
        except json.JSONDecodeError:  # the proxy's own 404, before the route exists
            status, response = 404, {}
        seen.add(status)
        if reached(status, response):
            return seen
        time.sleep(0.1)
    pytest.fail(f"{url}/health: statuses {seen}, last {response}")


def test_a_missing_path_is_reported_before_anything_starts(service):
    with pytest.raises(UserError, match=r"reranker: no folder nowhere.*UMARVEL_RERANKER"):
        build(service.model_copy(update={"reranker": "nowhere"}))


def test_an_index_of_another_model_is_rejected(service, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(service.embedder, other)
    file = other / "umarvel.json"
    file.write_text(file.read_text().replace('"bidirectional"', '"causal"'))
    with pytest.raises(UserError, match="embedded by a different model"):
        build(service.model_copy(update={"embedder": str(other)}))


def test_the_environment_overrides_the_config(service, monkeypatch):
    monkeypatch.setenv("UMARVEL_EMBEDDER", "elsewhere")
    with pytest.raises(UserError, match="no folder elsewhere"):
        build(service)
