"""The light client: what the library computes and the routes answer, errors in the service's words, and patience."""

from __future__ import annotations

import http.server
import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from tests.support.served import call, free_port
from umarvel_ray.client import Client, ServiceError
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker

QUERY = {"text": "a red fox", "instruction": "Find a picture."}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.effect_mandelbrot((48, 32), (-2, -1.2, 1, 1.2), 9).convert("RGB")


@pytest.fixture
def client(url) -> Client:
    return Client(url)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def test_embeddings_are_the_librarys_whatever_form_a_picture_has(client, service, picture, tmp_path):
    (tmp_path / "picture.png").write_bytes(png(picture))
    forms = [picture, png(picture), tmp_path / "picture.png", [picture, png(picture)]]
    embedder = Embedder.from_pretrained(service.embedder)
    expected = embedder.encode_document(
        [{"text": "a", "image": picture}] * 3 + [{"text": "a", "image": [picture, picture]}]
    )
    found = client.embed([{"text": "a", "image": form} for form in forms], "document")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(client.embed([QUERY]), embedder.encode_query([QUERY]), atol=1e-5)
    assert client.embed([]) == []


def test_reranking_keeps_the_order_of_the_documents(client, service):
    documents = ["two boats", "a fox", {"text": "a red fox"}]
    expected = Reranker.from_pretrained(service.reranker).score("a red fox", documents)
    np.testing.assert_allclose(client.rerank("a red fox", documents), expected, atol=1e-5)
    assert client.rerank("a red fox", []) == []


def test_hits_are_those_of_the_route(client, url):
    body = {"query": QUERY, "top_k": 4, "rerank": True, "return_documents": True, "filter": {"modality": ["image"]}}
    _, response, _ = call(f"{url}/v1/search", body)
    hits = client.search(QUERY, 4, rerank=True, filter={"modality": ["image"]})
    assert [(hit.id, hit.modality, hit.source, hit.text) for hit in hits] == [
        (one["id"], one["modality"], one["source"], one["document"]["text"]) for one in response["results"]
    ]
    np.testing.assert_allclose(
        [(hit.score, hit.rerank_score) for hit in hits],
        [(one["score"], one["rerank_score"]) for one in response["results"]],
        atol=1e-5,
    )
    assert [hit.images for hit in hits] == [(one["document"]["image"],) for one in response["results"]]
    assert [hit.images for hit in client.search(QUERY, 4, documents=False)] == [()] * 4


def test_an_added_document_is_found_with_its_pictures_and_then_deleted(client, picture):
    small = picture.resize((16, 16))
    added = client.add([{"id": "new one/2", "text": "mandelbrot", "image": [picture, small], "metadata": {"year": 7}}])
    [hit] = client.search({"text": "x"}, 3, filter={"metadata": {"year": [7]}}, after=added)
    assert (hit.id, hit.text, len(hit.images), len(hit.image_urls)) == ("new one/2", "mandelbrot", 2, 2)
    assert Image.open(io.BytesIO(client.picture("new one/2", 1))).size == (16, 16)
    deleted = client.delete(["new one/2", "unknown"])
    assert deleted > added
    assert client.search({"text": "x"}, 3, filter={"metadata": {"year": [7]}}, after=deleted) == []
    with pytest.raises(ServiceError, match="no document with this id"):
        client.picture("new one/2")


def test_what_is_refused_has_the_services_words_and_the_status(client):
    with pytest.raises(ServiceError, match=r"input\[1\]: an item needs text, image or video") as refused:
        client.embed(["a", {"text": ""}])
    assert refused.value.status == 400


@contextmanager
def answering(*answers: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[str, list]]:
    """A server with these answers, one after the other, and the headers of the requests it got."""
    left, got = list(answers), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, dict(self.headers)))
            status, headers, content = left.pop(0)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


EMBEDDED = b'{"data": [{"embedding": [1.0]}]}'
BUSY = (503, {"Retry-After": "0"}, b'{"error": {"message": "overloaded"}}')


def test_an_overloaded_service_is_asked_again_as_often_as_agreed():
    with answering(BUSY, BUSY, (200, {}, EMBEDDED)) as (url, got):
        assert Client(f"{url}/below/", key="k", retries=2).embed(["a"]) == [[1.0]]
        assert [(path, headers["Authorization"]) for path, headers in got] == [("/below/v1/embeddings", "Bearer k")] * 3
    with answering(BUSY, BUSY) as (url, got), pytest.raises(ServiceError, match="503: overloaded"):
        Client(url, retries=1).embed(["a"])


def test_a_service_that_does_not_say_when_is_not_asked_again():
    with answering((503, {}, b"gone\n")) as (url, _), pytest.raises(ServiceError, match=r"503: gone$"):
        Client(url).embed(["a"])


def test_nobody_there_is_one_line():
    with pytest.raises(ServiceError, match=r"no answer .*refused.*; is the service running there") as refused:
        Client(f"http://127.0.0.1:{free_port()}", retries=0).embed(["a"])
    assert refused.value.status is None


def test_it_imports_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import umarvel_ray.client; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(new - sys.stdlib_module_names - {'umarvel_ray'})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
