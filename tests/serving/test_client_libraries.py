"""The current clients of other services, unchanged and pointed at this one: vectors and scores are the library's."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request

import numpy as np
import pytest
import yaml

from tests.support.client_libraries import PYTHON, needs_clients, run_client
from tests.support.served import free_port
from tests.support.tiny_run import picture
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.reranker import Reranker

pytestmark = [pytest.mark.slow, needs_clients]

TEXTS = ["a red fox", "two boats near a pier", "quoted: <|im_end|>"]
SETUP = """
import json, sys
url = sys.argv[1]
texts = json.loads(sys.argv[2])
many = texts * 120  # more than one batch of any client
"""


@pytest.fixture(scope="module")
def embedder(service) -> Embedder:
    return Embedder.from_pretrained(service.embedder)


@pytest.fixture(scope="module")
def documents(embedder) -> np.ndarray:
    return embedder.encode_document(TEXTS)


@pytest.fixture(scope="module")
def queries(embedder) -> np.ndarray:
    return embedder.encode_query(TEXTS)


@pytest.fixture(scope="module")
def p_yes(service) -> np.ndarray:
    return Reranker.from_pretrained(service.reranker).score("a fox", TEXTS)


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-5)


def ranked(found: list, scores: np.ndarray) -> None:
    """`found` are the best (index, score), best first."""
    assert [index for index, _ in found] == np.argsort(-scores)[: len(found)].tolist()
    close([score for _, score in found], np.sort(scores)[::-1][: len(found)])


LANGCHAIN = """
from langchain_openai import OpenAIEmbeddings
from langchain_cohere import CohereEmbeddings, CohereRerank
openai = OpenAIEmbeddings(model="distillation", base_url=url + "/v1", api_key="none", check_embedding_ctx_length=False)
cohere = CohereEmbeddings(model="distillation", base_url=url, cohere_api_key="none")
rerank = CohereRerank(model="reranker", base_url=url, cohere_api_key="none", top_n=2)
print(json.dumps({
    "openai": openai.embed_documents(many),
    "documents": cohere.embed_documents(many),
    "queries": [cohere.embed_query(text) for text in texts],
    "rerank": [[one["index"], one["relevance_score"]] for one in rerank.rerank(texts, "a fox")],
}))
"""


def test_langchain(url, tmp_path, documents, queries, p_yes):
    found = run_client(SETUP + LANGCHAIN, tmp_path, url, json.dumps(TEXTS))
    close(found["openai"], np.tile(queries, (120, 1)))  # OpenAI has no sides: see docs/rag.md for documents
    close(found["documents"], np.tile(documents, (120, 1)))
    close(found["queries"], queries)
    ranked(found["rerank"], p_yes)


LLAMA_INDEX = """
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.embeddings.jinaai import JinaEmbedding
from llama_index.embeddings.jinaai.base import _JinaAPICaller
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.postprocessor.cohere_rerank import CohereRerank
openai = OpenAILikeEmbedding(model_name="distillation", api_base=url + "/v1", api_key="none")
jina = {}
for side in ("query", "passage"):
    jina[side] = JinaEmbedding(model="distillation", api_key="none", task="retrieval." + side, embed_batch_size=300)
    jina[side]._api = _JinaAPICaller(model="distillation", base_url=url + "/v1", api_key="none")
nodes = [NodeWithScore(node=TextNode(text=text, id_=str(number))) for number, text in enumerate(texts)]
rerank = CohereRerank(model="reranker", base_url=url, api_key="none", top_n=2)
best = rerank.postprocess_nodes(nodes, query_bundle=QueryBundle("a fox"))
try:
    jina["query"].get_text_embedding("\\ud800")
except Exception as error:
    refused = str(error)
print(json.dumps({
    "openai": openai.get_text_embedding_batch(many),
    "queries": jina["query"].get_text_embedding_batch(many),
    "documents": jina["passage"].get_text_embedding_batch(many),
    "picture": jina["passage"].get_image_embedding("picture.png"),
    "rerank": [[int(one.node.node_id), one.score] for one in best],
    "refused": refused,
}))
"""


def test_llama_index(url, tmp_path, embedder, documents, queries, p_yes):
    (tmp_path / "picture.png").write_bytes(picture(1))
    found = run_client(SETUP + LLAMA_INDEX, tmp_path, url, json.dumps(TEXTS))
    close(found["openai"], np.tile(queries, (120, 1)))
    close(found["queries"], np.tile(queries, (120, 1)))
    close(found["documents"], np.tile(documents, (120, 1)))
    close(found["picture"], embedder.encode_query([{"image": picture(1)}])[0])  # the client sends no task with it
    ranked(found["rerank"], p_yes)
    assert found["refused"] == "input[0].text: contains an unpaired surrogate, which is not a character"


INFINITY = """
from infinity_client import Client
from infinity_client.api.default import embeddings, rerank
from infinity_client.models import OpenAIEmbeddingInputText, RerankInput
from infinity_client.vision_client import InfinityVisionAPI
from PIL import Image
client = Client(base_url=url)
text = OpenAIEmbeddingInputText(input_=texts, model="distillation")
best = rerank.sync(client=client, body=RerankInput(query="a fox", documents=texts, model="reranker", top_n=2))
vision = InfinityVisionAPI(url=url, model="distillation")
image = Image.open("picture.png").convert("RGB")
pictures, _ = vision.image_embed("distillation", [image]).result()
vectors, tokens = vision.embed("distillation", texts).result()
print(json.dumps({
    "queries": [row.embedding for row in embeddings.sync(client=client, body=text).data],
    "vision": [row[0].tolist() for row in vectors],
    "picture": pictures[0][0].tolist(),
    "rerank": [[one.index, one.relevance_score] for one in best.results],
}))
"""


def test_infinity(url, tmp_path, embedder, queries, p_yes):
    (tmp_path / "picture.png").write_bytes(picture(1))
    found = run_client(SETUP + INFINITY, tmp_path, url, json.dumps(TEXTS))
    close(found["queries"], queries)
    close(found["vision"], queries)
    lossy = embedder.encode_query([{"image": picture(1)}])[0]
    assert np.dot(found["picture"], lossy) > 0.98  # the client sends JPEG
    ranked(found["rerank"], p_yes)


HUGGING_FACE = """
from huggingface_hub import InferenceClient
print(json.dumps({"queries": InferenceClient(url + "/embed").feature_extraction(texts).tolist()}))
"""


def test_the_client_of_text_embeddings_inference(url, tmp_path, queries):
    found = run_client(SETUP + HUGGING_FACE, tmp_path, url, json.dumps(TEXTS))
    close(found["queries"], queries)


THROUGH_LITELLM = """
from openai import OpenAI
import httpx
client = OpenAI(base_url=url + "/v1", api_key="sk-test", max_retries=0)
query = client.embeddings.create(model="umarvel", input=many)
body = {"model": "umarvel-rerank", "query": "a fox", "documents": texts, "top_n": 2}
best = httpx.post(url + "/v1/rerank", json=body, headers={"Authorization": "Bearer sk-test"}, timeout=60)
print(json.dumps({
    "queries": [row.embedding for row in query.data],
    "rerank": [[one["index"], one["relevance_score"]] for one in best.raise_for_status().json()["results"]],
}))
"""


@pytest.fixture
def litellm(url, tmp_path):
    """LiteLLM's proxy in front of the service; yields its address."""
    port = free_port()
    models = [
        {
            "model_name": "umarvel",
            "litellm_params": {"model": "openai/distillation", "api_base": f"{url}/v1", "api_key": "none"},
        },
        {
            "model_name": "umarvel-rerank",
            "litellm_params": {"model": "cohere/reranker", "api_base": f"{url}/v2/rerank", "api_key": "none"},
        },
    ]
    config = tmp_path / "litellm.yaml"
    config.write_text(yaml.safe_dump({"model_list": models, "general_settings": {"master_key": "sk-test"}}))
    log = tmp_path / "litellm.log"
    with log.open("w") as output:
        command = [PYTHON.parent / "litellm", "--config", config, "--host", "127.0.0.1", "--port", str(port)]
        environment = {"PATH": str(PYTHON.parent), "HOME": str(tmp_path), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=tmp_path)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/health/liveliness", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def test_litellm_as_a_proxy_in_front(litellm, tmp_path, queries, p_yes):
    found = run_client(SETUP + THROUGH_LITELLM, tmp_path, litellm, json.dumps(TEXTS))
    close(found["queries"], np.tile(queries, (120, 1)))
    ranked(found["rerank"], p_yes)
