"""Example queries for the report, selected by fixed rules, and their pictures, each stored once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from umarvel_ray.data.content import picture_key
from umarvel_ray.data.tables import Dataset
from umarvel_ray.evaluate.results import LadderResult
from umarvel_ray.items.images import BadImage, image_type, open_image, picture_uri
from umarvel_ray.retrieve.metrics import hit_at_k, positives_of

SHOWN = 5  # documents per query
KEEP_BYTES = 6_000  # a picture up to this size is embedded unchanged
THUMBNAIL = 128  # pixels: the longer side of a reduced picture
KEEP_FORMATS = ("png", "jpeg", "webp", "gif")
PICTURE_BUDGET = 3_000_000  # bytes of all data URIs


class Pictures:
    """Numbered data URIs, one per distinct picture, up to PICTURE_BUDGET bytes in total."""

    def __init__(self) -> None:
        self._number: dict[str, int | None] = {}
        self.uris: list[str] = []
        self._bytes = 0

    def add(self, image: bytes | str | None) -> int | None:
        """The picture's number; None if there is no picture, it cannot be read, or the budget is used up."""
        key = picture_key(image)
        if image is None or key is None:
            return None
        if key not in self._number:
            self._number[key] = self._store(image)
        return self._number[key]

    def _store(self, image: bytes | str) -> int | None:
        try:
            uri = picture_uri(_small(image))
        except BadImage:
            return None
        if self._bytes + len(uri) > PICTURE_BUDGET:
            return None
        self._bytes += len(uri)
        self.uris.append(uri)
        return len(self.uris) - 1


@dataclass
class Card:
    """A query or document as shown in the report; `picture` is a number from `Pictures`, `hit` marks positives."""

    text: str | None
    picture: int | None
    has_picture: bool
    hit: bool = False
    instruction: str | None = None
    score: float | None = None


@dataclass
class Example:
    """One query, why it was selected, and the first documents that each checkpoint of the ladder retrieved."""

    story: str
    query: Card
    found: dict[str, list[Card]] = field(default_factory=dict)


def choose(first: dict[str, float], last: dict[str, float]) -> list[tuple[str, str]]:
    """Select up to three queries: one that training fixed, one found all along, and one still missed.

    The first query that matches each rule is taken; if a rule has no match, other queries fill the gap.

    Args:
        first, last: recall of each query under the first and the last checkpoint.

    Returns:
        (why, query id) of each selected query.
    """
    rules = (
        ("Found after training", lambda id_: not first[id_] and last[id_]),
        ("Found all along", lambda id_: first[id_] and last[id_]),
        ("Still missed", lambda id_: not last[id_]),
    )
    chosen: dict[str, str] = {}
    for why, fits in rules:
        id_ = next((id_ for id_ in last if fits(id_)), None)
        if id_ is not None:
            chosen[id_] = why
    for id_ in last:
        if len(chosen) >= len(rules):
            break
        chosen.setdefault(id_, "Found" if last[id_] else "Missed")
    return [(why, id_) for id_, why in chosen.items()]


def examples(
    dataset: Dataset, split: str, results: Sequence[LadderResult], final: LadderResult, pictures: Pictures
) -> dict[str, list[Example]]:
    """By task, example queries with the first documents of every checkpoint's local ranking."""
    positives = positives_of(dataset, split)
    queries = {row["id"]: row for row in dataset.queries(split).to_pylist()}
    rankings = {result.name: _by_query(result.ranking("local")) for result in results}
    shown: dict[str, list[Example]] = {}
    for task, numbers in final.scores["local"].items():
        ids = [id_ for id_, row in rankings[final.name].items() if row["task"] == task]

        def recall(name: str, ids: list[str] = ids, k: int = int(numbers["k"])) -> dict[str, float]:
            found = rankings[name]
            return {id_: hit_at_k(found[id_]["document_ids"], positives[id_], k) for id_ in ids if id_ in found}

        for why, id_ in choose(recall(results[0].name), recall(final.name)):
            example = Example(why, _card(queries[id_], pictures))
            example.query.instruction = queries[id_]["instruction"]
            for result in results:
                row = rankings[result.name].get(id_, {"document_ids": [], "scores": []})
                example.found[result.name] = [
                    _card(document, pictures, document["id"] in positives[id_], score)
                    for document, score in zip(
                        _documents(dataset, row["document_ids"][:SHOWN]), row["scores"][:SHOWN], strict=True
                    )
                ]
            shown.setdefault(task, []).append(example)
    return shown


def _by_query(ranking: pa.Table) -> dict[str, dict]:
    return {row["query_id"]: row for row in ranking.to_pylist()}


def _documents(dataset: Dataset, ids: Sequence[str]) -> list[dict]:
    return dataset.documents.take(pa.array([dataset.row_of[id_] for id_ in ids], pa.int64())).to_pylist()


def _card(row: dict, pictures: Pictures, hit: bool = False, score: float | None = None) -> Card:
    return Card(row["text"], pictures.add(row["image"]), row["image"] is not None, hit, score=score)


def _small(image: bytes | str) -> bytes:
    """The encoded picture, reduced to a thumbnail unless it is small already."""
    if isinstance(image, bytes) and len(image) <= KEEP_BYTES and image_type(image) in KEEP_FORMATS:
        return image
    picture = open_image(image, "report")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
