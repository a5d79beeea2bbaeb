"""A client of the HTTP service, with the standard library only: nothing of torch, Ray or the models is imported."""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

from umarvel_ray.errors import UserError

Item = str | Mapping[str, Any]
MAX_WAIT_S = 30.0  # before one more try, whatever the service asks for


class ServiceError(UserError):
    """A request that the service refused, or could not answer; `status` is None if nothing was heard from it."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        score: cosine, plus weighted P(yes) if reranked.
        rerank_score: P(yes) in [0, 1], for the reranked documents.
        images: data URIs, where documents were asked for and fit in an answer.
        image_urls: where its pictures are, on the service.
    """

    id: str
    score: float
    rerank_score: float | None
    modality: str
    source: str
    text: str | None
    images: tuple[str, ...]
    image_urls: tuple[str, ...]


class Client:
    """Calls one service.

    An item is a text, or `{"text"?, "image"?, "video"?, "instruction"?}`. A picture is a PIL image, the bytes or the
    `Path` of a file, or a string: a data URI, base64, or a URL that the service may fetch. Several are a list.

    Args:
        url: such as http://127.0.0.1:8000, and the path below which the service is mounted, if any.
        key: API key, if the service has keys.
        timeout_s: for one answer.
        retries: how often a request is sent again while the service is overloaded or out of reach.
    """

    def __init__(
        self, url: str = "http://127.0.0.1:8000", key: str | None = None, timeout_s: float = 60.0, retries: int = 3
    ) -> None:
        self.url, self._timeout_s, self._retries = url.rstrip("/"), timeout_s, retries
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def embed(self, items: Sequence[Item], side: Literal["query", "document"] = "query") -> list[list[float]]:
        """Unit vectors (n, D), in the order of the items.

        Raises:
            ServiceError: the service refuses an item (and says which), or does not answer.
        """
        if not items:
            return []
        body = {"input": [_sent(item) for item in items], "input_type": side}
        return [one["embedding"] for one in self._call("/v1/embeddings", body)["data"]]

    def rerank(self, query: Item, documents: Sequence[Item]) -> list[float]:
        """P(yes) in [0, 1] that each document meets the query, in the order of the documents.

        Raises:
            ServiceError: as `embed`; or the service has no reranker.
        """
        if not documents:
            return []
        body = {"query": _sent(query), "documents": [_sent(one) for one in documents]}
        found = {one["index"]: one["relevance_score"] for one in self._call("/v1/rerank", body)["results"]}
        return [found[number] for number in range(len(documents))]

    def search(
        self,
        query: Item,
        top_k: int = 10,
        rerank: bool = False,
        filter: Mapping[str, Any] | None = None,
        after: int = 0,
        documents: bool = True,
    ) -> list[Hit]:
        """The best documents of the service's index, best first.

        Args:
            filter: `{"modality"?: [...], "source"?: [...], "metadata"?: {name: [...]}}`; a document must have one of
                the values under each name.
            after: what `add` or `delete` returned; the results reflect it.
            documents: whether texts and pictures come with the hits.

        Raises:
            ServiceError: as `embed`; or the service has no index, or no reranker.
        """
        body = {
            "query": _sent(query), "top_k": top_k, "rerank": rerank, "filter": filter or {}, "after": after,
            "return_documents": documents,
        }  # fmt: skip
        return [_hit(one) for one in self._call("/v1/search", body)["results"]]

    def add(self, documents: Sequence[Mapping[str, Any]]) -> int:
        """Add documents `{"id", "text"?, "image"?, "source"?, "metadata"?}`; they replace those of the same ids.

        They are on the service's disk when this returns.

        Returns:
            Number of the commit, for `after`.

        Raises:
            ServiceError: as `embed`; or the index is read-only.
        """
        return int(self._call("/v1/index", {"documents": [_sent(one) for one in documents]})["sequence"])

    def delete(self, ids: Sequence[str]) -> int:
        """Delete documents; unknown ids are passed over. Returns the number of the commit, as `add`.

        Raises:
            ServiceError: as `add`.
        """
        return int(self._call("/v1/index/delete", {"ids": list(ids)})["sequence"])

    def picture(self, document: str, number: int = 0) -> bytes:
        """The file of a document's picture, of several the one with this number.

        Raises:
            ServiceError: there is none, or no answer.
        """
        return self._send(f"/v1/documents/{quote(document, safe='')}/image?{urlencode({'n': number})}", None)

    def _call(self, path: str, body: Mapping[str, Any]) -> Any:
        return json.loads(self._send(path, json.dumps(body).encode()))

    def _send(self, path: str, data: bytes | None) -> bytes:
        request = urllib.request.Request(self.url + path, data, self._headers)
        for left in range(self._retries, -1, -1):
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                    found: bytes = answer.read()
                    return found
            except urllib.error.HTTPError as error:
                with error:
                    refused = ServiceError(f"{self.url}{path}: {error.code}: {_message(error.read())}", error.code)
                    wait = error.headers.get("Retry-After", "")
                if error.code not in (429, 503) or not left or not wait.isdigit():
                    raise refused from None
                time.sleep(min(float(wait), MAX_WAIT_S))
            except OSError as error:  # URLError and TimeoutError among them
                reason = getattr(error, "reason", error)
                if not left or isinstance(reason, TimeoutError):
                    raise ServiceError(f"{self.url}: no answer ({reason}); is the service running there?") from None
                time.sleep(0.5)
        raise AssertionError  # the last try returns or raises


def _sent(item: Item) -> Any:
    if isinstance(item, str):
        return item
    sent = dict(item)
    for name in ("image", "video"):
        if (given := sent.get(name)) is not None:
            several = isinstance(given, list | tuple)
            sent[name] = [_written(one) for one in given] if several else _written(given)
    return sent


def _written(media: Any) -> str:
    """Base64 of a picture or a video; a string as it is."""
    if isinstance(media, str):
        return media
    if isinstance(media, Path):
        media = media.read_bytes()
    elif hasattr(media, "save"):  # a PIL image
        file = BytesIO()
        media.save(file, "PNG")
        media = file.getvalue()
    return base64.b64encode(media).decode()


def _hit(found: Mapping[str, Any]) -> Hit:
    document = found.get("document") or {}
    shown = document.get("image") or []
    return Hit(
        id=found["id"],
        score=found["score"],
        rerank_score=found.get("rerank_score"),
        modality=found["modality"],
        source=found["source"],
        text=document.get("text"),
        images=tuple([shown] if isinstance(shown, str) else shown),
        image_urls=tuple(found.get("image_urls") or ()),
    )


def _message(answer: bytes) -> str:
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, TypeError, KeyError):  # of a proxy in between
        return answer[:200].decode(errors="replace").strip() or "no reason given"
