"""Pairs for the base to judge: a query with one document that answers it and some that do not, half of them near it."""

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.demo.corpus import Corpus, rows_of
from umarvel_ray.data.tables import item_of
from umarvel_ray.items.item import Item
from umarvel_ray.items.pair_encoder import EncodedPair, PairEncoder, join
from umarvel_ray.recipe import ModelSettings

NEAR = 24  # a hard negative is one of so many nearest documents of the task's pool
MAX_TEXT_TOKENS = 48
TEACHER_WIDTH = 384


@dataclass(frozen=True)
class Judged:
    """A pair in the reranker's words, the rows of its pictures in the corpus, and whether the document answers."""

    pair: EncodedPair
    pictures: tuple[int, ...]
    answers: bool


class Judging:
    """The queries of one split, each with the documents of its own task to choose from.

    `meanings`: by text, (D,) of unit length; without any, all wrong documents are drawn at random.
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
        many = Counter(query["task"] for query in self.queries)
        self.weights = [many[query["task"]] ** -0.5 for query in self.queries]
        self._pool_meanings: dict[str, Tensor] = {}
        self._near: dict[tuple[str, str], list[str]] = {}
        self._sides: dict[tuple[str, str], EncodedPair] = {}

    def draw(self, count: int, wrong: int, source: random.Random) -> list[Judged]:
        """`count` queries, each with a document that answers it and then `wrong` that do not."""
        drawn = []
        for query in source.choices(self.queries, self.weights, k=count):
            right = source.choice([i for i in query["positive_ids"] if i in self.documents])
            drawn.append(self._judged(query, right, True))
            drawn += [self._judged(query, i, False) for i in self._wrong(query, right, wrong, source)]
        return drawn

    def _wrong(self, query: dict, right: str, count: int, source: random.Random) -> list[str]:
        near = self._near_to(query["task"], right) if self.meanings else []
        chosen = []
        while len(chosen) < count:
            pool = near if near and source.random() < 0.5 else self.pools[query["task"]]
            document = source.choice(pool)
            if document not in query["positive_ids"] and (
                query["task"].endswith("task7") or self.documents[document]["concept"] != query["concept"]
            ):
                chosen.append(document)
        return chosen

    def _near_to(self, task: str, right: str) -> list[str]:
        """The pool's nearest documents of other concepts; where a change is asked for, of the same concept."""
        if (task, right) not in self._near:
            concept = self.documents[right]["concept"]
            pool = self.pools[task]
            if task.endswith("task7"):
                near = [i for i in pool if self.documents[i]["concept"] == concept and i != right]
            else:
                if task not in self._pool_meanings:
                    self._pool_meanings[task] = torch.stack([self._meaning(i) for i in pool])
                alike = self._pool_meanings[task] @ self._meaning(right)
                order = alike.topk(min(len(pool), 2 * NEAR)).indices.tolist()
                near = [pool[n] for n in order if self.documents[pool[n]]["concept"] != concept][:NEAR]
            self._near[task, right] = near
        return self._near[task, right]

    def _meaning(self, document: str) -> Tensor:
        row = self.documents[document]
        texts = [row["text"]] if row["text"] else self.corpus.texts[self.corpus.number[row["image"]]]
        known = [self.meanings[text] for text in texts if text in self.meanings]
        return torch.stack(known).mean(0) if known else torch.zeros(TEACHER_WIDTH)

    def _judged(self, query: dict, document: str, answers: bool) -> Judged:
        shown = self.documents[document]
        sides = [self._side(query, self.encoder.encode_query), self._side(shown, self.encoder.encode_document)]
        pictures = tuple(self.corpus.number[row["image"]] for row in (query, shown) if row["image"] is not None)
        return Judged(join(sides), pictures, answers)

    def _side(self, row: dict, encode: Callable[[Item], EncodedPair]) -> EncodedPair:
        key = encode.__name__, row["id"]  # a query and a document may have the same id
        if key not in self._sides:
            # The tower is given the corpus' pictures: what was decoded here need not be kept.
            self._sides[key] = replace(encode(item_of(row)), pictures=())
        return self._sides[key]


def common_start(pairs: list[EncodedPair]) -> int:
    """How many tokens all pairs begin with."""
    shortest = min(pair.length for pair in pairs)
    rows = np.stack([pair.input_ids[:shortest] for pair in pairs])
    same = (rows == rows[0]).all(0)
    return int(same.argmin()) if not same.all() else shortest


def after(pair: EncodedPair, start: int) -> EncodedPair:
    """The pair without its first tokens, whose places it keeps."""
    return replace(
        pair, input_ids=pair.input_ids[start:], labels=pair.labels[start:], positions=pair.positions[:, start:]
    )
