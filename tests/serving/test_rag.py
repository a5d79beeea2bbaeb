"""The code in docs/rag.md, run against the service with LangChain and LlamaIndex."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.conftest import REPO
from tests.support.client_libraries import needs_clients, run_client
from tests.support.served import call
from umarvel_ray.model.embedder import Embedder

DOCUMENTS = ["a red fox", "two boats near a pier"]
FOUND = """
import json
print(json.dumps({
    "vectors": [[query_vector, *document_vectors], [node_query_vector, *node_document_vectors]],
    "documents": [[one.id, one.page_content, one.metadata["image"], one.metadata["score"]] for one in documents],
    "nodes": [[one.node.node_id, one.node.text, getattr(one.node, "image", None), one.score] for one in nodes],
    "context": context,
}))
"""

pytestmark = [pytest.mark.slow, needs_clients]


@pytest.fixture(scope="module")
def found(url, tmp_path_factory) -> dict:
    """What the code blocks of the page compute, in another process."""
    blocks = re.findall(r"^```python\n(.*?)^```", (REPO / "docs/rag.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    code = "".join(blocks).replace("http://localhost:8000", url) + FOUND
    return run_client(code, tmp_path_factory.mktemp("clients"))


def test_embedding_classes_equal_the_library(found, service):
    embedder = Embedder.from_pretrained(service.embedder)
    expected = np.concatenate([embedder.encode_query(["a red fox"]), embedder.encode_document(DOCUMENTS)])
    for vectors in found["vectors"]:
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_retrievers_equal_the_search_route(found, url):
    body = {"query": "a red fox", "top_k": 3, "rerank": True, "return_documents": True}
    _, response, _ = call(f"{url}/v1/search", body)
    hits = [(hit["id"], hit["document"]["text"] or "", hit["document"]["image"]) for hit in response["results"]]
    assert len(hits) == 3
    assert [tuple(one[:3]) for one in found["documents"]] == hits
    base64 = [image and image.partition(",")[2] for _, _, image in hits]
    assert [tuple(one[:3]) for one in found["nodes"]] == [
        (id_, text, image) for (id_, text, _), image in zip(hits, base64, strict=True)
    ]
    for kind in ("documents", "nodes"):
        np.testing.assert_allclose(
            [one[3] for one in found[kind]], [hit["score"] for hit in response["results"]], atol=1e-5
        )
    parts = [part["image_url"]["url"] if "image_url" in part else part["text"] for part in found["context"]]
    assert parts == [part for _, text, image in hits for part in (text, image) if part]
