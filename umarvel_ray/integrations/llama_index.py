"""LlamaIndex: a retriever that searches the service's index, and an embedding model for an index of your own.

pip install llama-index-core
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.embeddings import MultiModalEmbedding
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import ImageNode, ImageType, NodeWithScore, QueryBundle, TextNode

from umarvel_ray.client import Client, Hit


class UmarvelRetriever(BaseRetriever):
    """Finds texts and pictures with one question. A document with pictures is an `ImageNode` that shows the first.

    Args:
        url, key: of the service, as for `umarvel_ray.client.Client`.
        instruction: what to look for.
        top_k: how many documents.
        rerank: whether the reranker scores the nearest documents again.
        filter: as for `Client.search`.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        instruction: str | None = None,
        top_k: int = 5,
        rerank: bool = True,
        filter: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._client, self._instruction = Client(url, key), instruction
        self._top_k, self._rerank, self._filter = top_k, rerank, filter

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        asked = {"text": query_bundle.query_str, "instruction": self._instruction}
        hits = self._client.search(asked, self._top_k, self._rerank, self._filter)
        return [NodeWithScore(node=_node(hit), score=hit.score) for hit in hits]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


class UmarvelEmbedding(MultiModalEmbedding):
    """Unit vectors of texts and pictures in one space; queries with an instruction, documents without.

    Args:
        url, key: of the service.
        instruction: of the queries.
    """

    url: str = Field(default="http://127.0.0.1:8000")
    instruction: str | None = None
    _client: Client = PrivateAttr()

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, **settings: Any) -> None:
        super().__init__(url=url, **({"model_name": "umarvel"} | settings))
        self._client = Client(url, key)

    @classmethod
    def class_name(cls) -> str:
        return "UmarvelEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._client.embed([{"text": query, "instruction": self.instruction}])[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._client.embed(texts, "document")

    def _get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return self._client.embed([{"image": _picture(one)} for one in img_file_paths], "document")

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return await asyncio.to_thread(self._get_image_embedding, img_file_path)


def _picture(given: ImageType) -> Any:
    return Path(given) if isinstance(given, str) else given.read()


def _node(hit: Hit) -> TextNode:
    text, metadata = hit.text or "", {"modality": hit.modality, "source": hit.source}
    if not hit.images:
        return TextNode(id_=hit.id, text=text, metadata=metadata)
    return ImageNode(id_=hit.id, text=text, image=hit.images[0].partition(",")[2], metadata=metadata)
