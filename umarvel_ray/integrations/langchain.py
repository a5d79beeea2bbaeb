"""LangChain: a retriever that searches the service's index, and embeddings for a vector store of your own.

pip install langchain-core
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from pydantic import SecretStr

from umarvel_ray.client import Client


class UmarvelRetriever(BaseRetriever):
    """Finds texts and pictures with one question.

    A document's metadata has `images` (data URIs, see `content`), `modality`, `source`, `score` and `rerank_score`.

    Args:
        url, key: of the service, as for `umarvel_ray.client.Client`.
        instruction: what to look for, such as "Find a picture that answers the question."
        top_k: how many documents.
        rerank: whether the reranker scores the nearest documents again.
        filter: as for `Client.search`.
    """

    url: str = "http://127.0.0.1:8000"
    key: SecretStr | None = None
    instruction: str | None = None
    top_k: int = 5
    rerank: bool = True
    filter: dict[str, Any] | None = None

    @cached_property
    def _client(self) -> Client:
        return Client(self.url, self.key.get_secret_value() if self.key else None)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        asked = {"text": query, "instruction": self.instruction}
        return [
            Document(
                id=hit.id,
                page_content=hit.text or "",
                metadata={
                    "images": list(hit.images), "modality": hit.modality, "source": hit.source, "score": hit.score,
                    "rerank_score": hit.rerank_score,
                },
            )
            for hit in self._client.search(asked, self.top_k, self.rerank, self.filter)
        ]  # fmt: skip


class UmarvelEmbeddings(Embeddings):
    """Unit vectors of texts and pictures in one space; queries with an instruction, documents without.

    Args:
        url, key: of the service.
        instruction: of the queries.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", key: str | None = None, instruction: str | None = None
    ) -> None:
        self._client, self._instruction = Client(url, key), instruction

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._client.embed(texts, "document")

    def embed_query(self, text: str) -> list[float]:
        return self._client.embed([{"text": text, "instruction": self._instruction}])[0]

    def embed_image(self, uris: list[str]) -> list[list[float]]:
        """Vectors of picture files, as multimodal vector stores ask for them.

        Args:
            uris: paths.
        """
        return self._client.embed([{"image": Path(uri)} for uri in uris], "document")


def content(documents: list[Document]) -> list[dict[str, Any]]:
    """The retrieved texts and pictures as content parts of a chat message that a multimodal model reads."""
    parts: list[dict[str, Any]] = []
    for document in documents:
        if document.page_content:
            parts.append({"type": "text", "text": document.page_content})
        parts += [{"type": "image_url", "image_url": {"url": image}} for image in document.metadata["images"]]
    return parts
