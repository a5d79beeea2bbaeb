"""What the demo's base is pretrained on: the training split of the demo data as pictures with their texts, descriptive
passages, and (prompt, answer) turns made from the training queries.
"""

import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tools.demo.base_model import SIDE


@dataclass(frozen=True)
class Turn:
    """A prompt with its answer; `picture` is a row of `Corpus.pictures`, or None."""

    prompt: str
    picture: int | None
    answer: str


@dataclass(frozen=True)
class Corpus:
    """One split as training material.

    Attributes:
        pictures: uint8 (n, 3, 64, 64), all different.
        concepts: of each picture.
        texts: descriptions of each picture, possibly none.
        pairs: (text, passage) that belong together.
        requests: what queries ask about their picture.
        number: a picture's row by its file's bytes.
    """

    pictures: np.ndarray
    concepts: list[str]
    texts: list[list[str]]
    pairs: list[tuple[str, str]]
    requests: list[str]
    turns: list[Turn]
    number: dict[bytes, int]

    @property
    def passages(self) -> list[str]:
        """Every distinct text, in a fixed order."""
        described = [text for texts in self.texts for text in texts]
        return sorted({*described, *(text for pair in self.pairs for text in pair)})


def read_corpus(folder: Path, split: str) -> Corpus:
    """Read the rows of one split ("train", or "validation" for monitoring)."""
    documents = [row for row in rows_of(folder / "documents.parquet") if row["split"] == split]
    names = ["text_pairs", "image_pairs", "train"] if split == "train" else [split]
    queries = [row for name in names for row in rows_of(folder / f"{name}.parquet")]
    by_id = {row["id"]: row for row in documents}

    number: dict[bytes, int] = {}
    concepts, texts = [], defaultdict(set)
    for row in [*documents, *queries]:
        if row["image"] is None:
            continue
        if row["image"] not in number:
            number[row["image"]] = len(number)
            concepts.append(row["concept"])
        if row["id"] in by_id and row["text"]:
            texts[number[row["image"]]].add(row["text"])
    pairs, turns = set(), []
    for query in queries:
        seen = number.get(query["image"])
        for document in (by_id[i] for i in query["positive_ids"] if i in by_id):
            shown = number.get(document["image"])
            if query["text"] and document["text"] and seen is None:
                pairs.add((query["text"], document["text"]))
            if seen is None and shown is not None:
                texts[shown].add(query["text"])
            if query["text"] is None and document["text"]:
                texts[seen].add(document["text"])
            if seen is not None and document["text"]:
                prompt = " ".join(filter(None, [query["instruction"], query["text"]]))
                turns.append(Turn(prompt, seen, document["text"]))
    described = [sorted(texts[i]) for i in range(len(number))]
    for query in queries:  # a picture with a requested change: the answer is what the changed picture shows
        if query["image"] is not None and query["text"]:
            for document in (by_id[i] for i in query["positive_ids"] if i in by_id):
                shown = number.get(document["image"])
                if not document["text"] and shown is not None and described[shown]:
                    turns.append(Turn(query["text"], number[query["image"]], min(described[shown], key=len)))
    turns += [Turn("What is this?", i, text) for i, own in enumerate(described) for text in own]
    turns += [Turn(text, None, passage) for text, passage in sorted(pairs)]
    pictures = np.stack([_pixels(data) for data in number])
    requests = sorted({query["text"] for query in queries if query["image"] is not None and query["text"]})
    return Corpus(pictures, concepts, described, sorted(pairs), requests, turns, number)


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def _pixels(data: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture).transpose(2, 0, 1)
