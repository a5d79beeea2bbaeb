"""The code in docs/rag.md, run against the service with LangChain and LlamaIndex, in an environment without torch."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.conftest import REPO
from tests.support.client_libraries import needs_clients, run_client
from tests.support.served import call
from umarvel_ray.model.embedder import Embedder

DOCUMENTS = ["a red fox", "two boats near a pier"]
INSTRUCTION = "Find a picture that matches."
PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
FOUND = """
import asyncio, base64, json
from pathlib import Path

Path("one.png").write_bytes(base64.b64decode("PICTURE"))
images = [embeddings.embed_image(["one.png"])[0], embedding.get_image_embedding("one.png")]
later = asyncio.run(UmarvelNodeRetriever("URL", top_k=3).aretrieve("a red fox"))
print(json.dumps({
    "vectors": [[query_vector, *document_vectors], [node_query_vector, *node_document_vectors]],
    "images": images,
    "openai": [for_queries.embed_query("a red fox"), *for_documents.embed_documents(["a red fox"])],
    "documents": [[one.id, one.page_content, one.metadata["images"], one.metadata["score"]] for one in documents],
    "nodes": [[one.node.node_id, one.node.text, getattr(one.node, "image", None), one.score] for one in nodes],
    "later": [one.node.node_id for one in later],
    "context": context,
    "client": [[hit.id for hit in hits], vectors, scores],
}))
"""

pytestmark = [pytest.mark.slow, needs_clients]


@pytest.fixture(scope="module")
def found(url, tmp_path_factory) -> dict:
    """What the code blocks of the page compute, in another process."""
    blocks = re.findall(r"^```python\n(.*?)^```", (REPO / "docs/rag.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    code = ("".join(blocks) + FOUND).replace("http://localhost:8000", url).replace("URL", url)
    code = code.replace("base64,…", f"base64,{PICTURE}").replace("PICTURE", PICTURE)
    return run_client(code, tmp_path_factory.mktemp("clients"), PYTHONPATH=str(REPO))


def test_embedding_classes_equal_the_library(found, service):
    embedder = Embedder.from_pretrained(service.embedder)
    query = {"text": "a red fox", "instruction": INSTRUCTION}
    expected = np.concatenate([embedder.encode_query([query]), embedder.encode_document(DOCUMENTS)])
    for vectors in found["vectors"]:
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    image = {"image": f"data:image/png;base64,{PICTURE}"}
    np.testing.assert_allclose(found["images"], np.repeat(embedder.encode_document([image]), 2, 0), atol=1e-5)
    plain = [embedder.encode_query(["a red fox"])[0], embedder.encode_document(["a red fox"])[0]]
    np.testing.assert_allclose(found["openai"], plain, atol=1e-5)


def test_the_clients_block_is_what_the_library_computes(found, service, url):
    hits, vectors, scores = found["client"]
    embedder = Embedder.from_pretrained(service.embedder)
    items = ["a red fox", {"text": "in winter", "image": f"data:image/png;base64,{PICTURE}"}]
    np.testing.assert_allclose(vectors, embedder.encode_query(items), atol=1e-5)
    query = {"text": "a red fox", "instruction": INSTRUCTION}
    _, response, _ = call(f"{url}/v1/search", {"query": query, "top_k": 3, "rerank": True})
    assert hits == [hit["id"] for hit in response["results"]]
    _, response, _ = call(f"{url}/v1/rerank", {"query": "a red fox", "documents": ["a fox", "two boats"]})
    by_index = {one["index"]: one["relevance_score"] for one in response["results"]}
    np.testing.assert_allclose(scores, [by_index[0], by_index[1]], atol=1e-5)


def test_retrievers_equal_the_search_route(found, url):
    body = {"query": "a red fox", "top_k": 3, "rerank": True, "return_documents": True}
    _, response, _ = call(f"{url}/v1/search", body)
    hits = [(hit["id"], hit["document"]["text"] or "", hit["document"]["image"]) for hit in response["results"]]
    assert len(hits) == 3
    assert [tuple(one[:3]) for one in found["documents"]] == [
        (id_, text, [image] if image else []) for id_, text, image in hits
    ]
    base64 = [image and image.partition(",")[2] for _, _, image in hits]
    assert [tuple(one[:3]) for one in found["nodes"]] == [
        (id_, text, image) for (id_, text, _), image in zip(hits, base64, strict=True)
    ]
    assert found["later"] == [id_ for id_, _, _ in hits]
    for kind in ("documents", "nodes"):
        np.testing.assert_allclose(
            [one[3] for one in found[kind]], [hit["score"] for hit in response["results"]], atol=1e-5
        )
    parts = [part["image_url"]["url"] if "image_url" in part else part["text"] for part in found["context"]]
    assert parts == [part for _, text, image in hits for part in (text, image) if part]
