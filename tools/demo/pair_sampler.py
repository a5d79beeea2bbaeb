"""Pairs for the base to judge: a query with one positive and some negatives, half of which resemble the positive."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.demo.corpus import Corpus, rows_of
from umarvel_ray.data.dataset import item_of
from umarvel_ray.items.item import Item
from umarvel_ray.items.pair_encoder import EncodedPair, PairEncoder, join
from umarvel_ray.recipe import ModelSettings

NEAR = 24  # a hard negative is one of this many nearest documents in the task's pool
MAX_TEXT_TOKENS = 48
TEACHER_WIDTH = 384


@dataclass(frozen=True)
class JudgedPair:
    """An encoded pair, the corpus rows of its pictures, and whether the document answers the query."""

    pair: EncodedPair
    pictures: tuple[int, ...]
    answers: bool


class PairSampler:
    """Draws pairs from the queries of one split and their tasks' documents.

    Args:
        meanings: unit vectors (D,) by text; if empty, all negatives are drawn at random.
    """

    def __init__(self, folder: Path, split: str, corpus: Corpus, base: Path, meanings: dict[str, Tensor]) -> None:
        self.documents = {row["id"]: row for row in rows_of(folder / "documents.parquet") if row["split"] == split}
        self.queries = rows_of(folder / f"{split}.parquet")
        self.corpus, self.meanings = corpus, meanings
        settings = ModelSettings(min_pixels=4096, max_pixels=4096, max_text_tokens=96)
        self.encoder = PairEncoder.from_pretrained(base, settings, MAX_TEXT_TOKENS)
        pools = defaultdict(dict)
        for query in self.queries:
            pools[query["task"]] |= dict.fromkeys(i for i in query["positive_ids"] if i in self.documents)
        self.pools = {task: list(ids) for task, ids in pools.items()}
        per_task = Counter(query["task"] for query in self.queries)
        self.weights = [per_task[query["task"]] ** -0.5 for query in self.queries]
        self._pool_meanings: dict[str, Tensor] = {}
        self._near: dict[tuple[str, str], list[str]] = {}
        self._sides: dict[tuple[str, str], EncodedPair] = {}

    def draw(self, count: int, negatives: int, rng: random.Random) -> list[JudgedPair]:
        """`count` queries, each with one positive followed by `negatives` documents that do not answer it."""
        drawn = []
        for query in rng.choices(self.queries, self.weights, k=count):
            positive = rng.choice([i for i in query["positive_ids"] if i in self.documents])
            drawn.append(self._judged(query, positive, True))
            drawn += [self._judged(query, i, False) for i in self._negatives(query, positive, negatives, rng)]
        return drawn

    def _negatives(self, query: dict, positive: str, count: int, rng: random.Random) -> list[str]:
        near = self._near_to(query["task"], positive) if self.meanings else []
        chosen = []
        while len(chosen) < count:
            pool = near if near and rng.random() < 0.5 else self.pools[query["task"]]
            document = rng.choice(pool)
            if document not in query["positive_ids"] and (
                query["task"].endswith("task7") or self.documents[document]["concept"] != query["concept"]
            ):
                chosen.append(document)
        return chosen

    def _near_to(self, task: str, positive: str) -> list[str]:
        """The pool's nearest documents of other concepts; for task 7, which asks for a change, of the same concept."""
        if (task, positive) not in self._near:
            concept = self.documents[positive]["concept"]
            pool = self.pools[task]
            if task.endswith("task7"):
                near = [i for i in pool if self.documents[i]["concept"] == concept and i != positive]
            else:
                if task not in self._pool_meanings:
                    self._pool_meanings[task] = torch.stack([self._meaning(i) for i in pool])
                similarity = self._pool_meanings[task] @ self._meaning(positive)
                order = similarity.topk(min(len(pool), 2 * NEAR)).indices.tolist()
                near = [pool[n] for n in order if self.documents[pool[n]]["concept"] != concept][:NEAR]
            self._near[task, positive] = near
        return self._near[task, positive]

    def _meaning(self, document: str) -> Tensor:
        row = self.documents[document]
        texts = [row["text"]] if row["text"] else self.corpus.texts[self.corpus.number[row["image"]]]
        known = [self.meanings[text] for text in texts if text in self.meanings]
        return torch.stack(known).mean(0) if known else torch.zeros(TEACHER_WIDTH)

    def _judged(self, query: dict, document: str, answers: bool) -> JudgedPair:
        shown = self.documents[document]
        sides = [self._side(query, self.encoder.encode_query), self._side(shown, self.encoder.encode_document)]
        pictures = tuple(self.corpus.number[row["image"]] for row in (query, shown) if row["image"] is not None)
        return JudgedPair(join(sides), pictures, answers)

    def _side(self, row: dict, encode: Callable[[Item], EncodedPair]) -> EncodedPair:
        key = encode.__name__, row["id"]  # a query and a document may have the same id
        if key not in self._sides:
            # The tower reads the corpus's pictures, so the decoded ones need not be kept.
            self._sides[key] = replace(encode(item_of(row)), pictures=())
        return self._sides[key]


def common_prefix_length(pairs: list[EncodedPair]) -> int:
    """The number of tokens that all pairs start with."""
    shortest = min(pair.length for pair in pairs)
    rows = np.stack([pair.input_ids[:shortest] for pair in pairs])
    same = (rows == rows[0]).all(0)
    return int(same.argmin()) if not same.all() else shortest


def without_prefix(pair: EncodedPair, start: int) -> EncodedPair:
    """The pair without its first tokens; the others keep their positions."""
    return replace(
        pair, input_ids=pair.input_ids[start:], labels=pair.labels[start:], positions=pair.positions[:, start:]
    )
