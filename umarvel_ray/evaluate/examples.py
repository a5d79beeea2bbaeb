"""Example queries for the report, selected by fixed rules, and their pictures, each stored once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from umarvel_ray.data.content import picture_key
from umarvel_ray.data.dataset import Dataset
from umarvel_ray.evaluate.results import LadderResult
from umarvel_ray.items.images import BadImage, image_type, open_image, picture_uris, pictures_of
from umarvel_ray.retrieve.metrics import find_hits, recall_at_k

SHOWN = 5  # documents per query
KEEP_BYTES = 6_000  # a picture up to this size is embedded unchanged
THUMBNAIL = 128  # pixels: the longer side of a reduced picture
KEEP_FORMATS = ("png", "jpeg", "webp", "gif")
PICTURE_BUDGET = 3_000_000  # bytes of all data URIs


class Pictures:
    """Numbered data URIs, one per distinct picture, up to PICTURE_BUDGET bytes in total."""

    def __init__(self) -> None:
        self._number: dict[int, int | None] = {}
        self.uris: list[str] = []
        self._bytes = 0

    def add(self, image: bytes | str) -> int | None:
        """The number of a picture; None if it cannot be read, or the budget is used up."""
        key = picture_key({"image": image})
        if key not in self._number:
            self._number[key] = self._store(image)
        return self._number[key]

    def _store(self, image: bytes | str) -> int | None:
        try:
            [uri] = picture_uris(_small(image)) or [""]
        except BadImage:
            return None
        if not uri or self._bytes + len(uri) > PICTURE_BUDGET:
            return None
        self._bytes += len(uri)
        self.uris.append(uri)
        return len(self.uris) - 1


@dataclass
class Card:
    """A query or document as shown in the report; `pictures` are numbers from `Pictures`, `hit` marks positives."""

    text: str | None
    pictures: list[int | None]
    hit: bool = False
    instruction: str | None = None
    score: float | None = None


@dataclass
class Example:
    """One query, why it was selected, and the first documents that each checkpoint of the ladder retrieved."""

    story: str
    query: Card
    found: dict[str, list[Card]] = field(default_factory=dict)


def choose(first: np.ndarray, last: np.ndarray) -> list[tuple[str, int]]:
    """Select up to three queries: one that training fixed, one found all along, and one still missed.

    The first query that matches each rule is taken; if a rule has no match, other queries fill the gap.

    Args:
        first, last: bool (n,), whether the first and the last checkpoint found each query's positive.

    Returns:
        (why, number) of each selected query.
    """
    rules = (("Found after training", ~first & last), ("Found all along", first & last), ("Still missed", ~last))
    chosen = {int(fits.argmax()): why for why, fits in rules if fits.any()}
    for number in range(min(len(last), len(rules))):
        if len(chosen) < len(rules):
            chosen.setdefault(number, "Found" if last[number] else "Missed")
    return [(why, number) for number, why in chosen.items()]


def examples(
    dataset: Dataset, split: str, results: Sequence[LadderResult], final: LadderResult, pictures: Pictures
) -> dict[str, list[Example]]:
    """By task, example queries with the first documents of every checkpoint's local ranking."""
    queries = dataset.queries(split)
    chosen = _chosen(dataset, split, results[0], final)
    rows = queries.rows[[position for of_task in chosen.values() for _, position in of_task]]
    found = {result.name: _first_documents(result.ranking("local"), rows) for result in results}
    shown: dict[str, list[Example]] = {}
    for task, of_task in chosen.items():
        for why, position in of_task:
            row, positives = int(queries.rows[position]), queries.positives.at(position)
            [query] = queries.table.rows([row], ("text", "image", "instruction"))
            example = Example(why, _card(query, pictures))
            example.query.instruction = query["instruction"]
            for result in results:
                documents, scores = found[result.name].get(row, ([], []))
                contents = dataset.documents.rows(documents, ("text", "image"))
                example.found[result.name] = [
                    _card(content, pictures, document in positives, score)
                    for document, content, score in zip(documents, contents, scores, strict=True)
                ]
            shown.setdefault(task, []).append(example)
    return shown


def _chosen(dataset: Dataset, split: str, base: LadderResult, final: LadderResult) -> dict[str, list[tuple[str, int]]]:
    """By task, why and at which position of the split's queries."""
    queries = dataset.queries(split)
    last = final.ranking("local")
    at = np.sort(np.searchsorted(queries.rows, last["query"].to_numpy()))  # of the queries that could be embedded
    hits = [find_hits(ranking, queries) for ranking in (base.ranking("local"), last)]
    chosen = {}
    for task, numbers in final.scores["local"].items():
        own = at[np.isin(at, queries.of_task(task), assume_unique=True)]
        k = np.full(queries.n, int(numbers["k"]))
        first_found, last_found = (recall_at_k(of_result, k)[own] > 0 for of_result in hits)
        chosen[task] = [(why, int(own[number])) for why, number in choose(first_found, last_found)]
    return chosen


def _first_documents(ranking: pa.Table, queries: np.ndarray) -> dict[int, tuple[list[int], list[float]]]:
    """The first documents and their scores for some queries, by row number."""
    rows = ranking.filter(pc.is_in(ranking["query"], pa.array(queries))).to_pylist()
    return {row["query"]: (row["documents"][:SHOWN], row["scores"][:SHOWN]) for row in rows}


def _card(row: dict, pictures: Pictures, hit: bool = False, score: float | None = None) -> Card:
    return Card(row["text"], [pictures.add(image) for image in pictures_of(row["image"])], hit, score=score)


def _small(image: bytes | str) -> bytes:
    """The encoded picture, reduced to a thumbnail unless it is small already."""
    if isinstance(image, bytes) and len(image) <= KEEP_BYTES and image_type(image) in KEEP_FORMATS:
        return image
    picture = open_image(image, "report")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
