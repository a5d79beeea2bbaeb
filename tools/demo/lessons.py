"""The lessons of a base that continues: what the embedder and the reranker make of its states, in their own templates.

The embedder's vector is taught to be the text teacher's, reduced to HIDDEN dimensions by the basis of the word
embeddings. No head stands in between, so an untrained embedder has what was learned here.
"""

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo.corpus import Corpus, Turn
from tools.demo.losses import Heads, Losses, PretrainingLosses, towards
from tools.demo.pair_sampler import PairSampler
from tools.demo.reading import Reader
from tools.demo.views import PICTURE, Views
from umarvel_ray.items.encoder import EncodedItem
from umarvel_ray.items.item import Item


class Lessons(PretrainingLosses):
    """The losses of the further part.

    Args:
        dictionary: (words, gloss), whose meanings are given too.
    """

    def __init__(
        self,
        corpus: Corpus,
        views: Views,
        meanings: dict[str, Tensor],
        sampler: PairSampler,
        reader: Reader,
        heads: Heads,
        dictionary: list[tuple[str, str]],
    ) -> None:
        super().__init__(corpus, views, meanings, reader, heads)
        self.sampler, self.encoder = sampler, sampler.encoder.items
        self.picture = self.encoder.pictures({"image": PICTURE}, "picture")
        self.instructions = sorted({query["instruction"] for query in sampler.queries})
        self.row = {text: i for i, text in enumerate(self.taught_texts)}
        self.pairs = sorted([*dictionary, *corpus.pairs], key=lambda pair: len(pair[1]))
        self.definitions = [Turn(words, None, gloss) for words, gloss in dictionary]

    def further(self) -> Losses:
        losses, drawn, tokens = self._picture_losses(pairs=12, captions=12)
        alone = self._read([{"image": PICTURE} for _ in drawn], tokens)
        losses["seen"] = 0.5 * self._word_loss(drawn, alone)
        losses["same"] = 0.3 * self._partner_loss(drawn, alone)
        losses["parts"] = self._parts_loss(drawn[::2], tokens[::2], alone[::2].detach())
        rows = self._rows_of_similar_length(48)
        losses |= towards(self._read([{"text": self.taught_texts[i]} for i in rows]), self.taught_meanings[rows])
        losses["defined"] = self._pair_loss(24)
        losses["glosses"] = 0.1 * self.reader.answer_loss(random.choices(self.definitions, k=4), None)
        return losses | self._judged_losses(queries=4, negatives=3)

    def _parts_loss(self, drawn: Tensor, tokens: Tensor, alone: Tensor) -> Tensor:
        """A picture with a text means the sum of what both mean apart.

        Args:
            alone: the pictures' vectors without a text.
        """
        texts = [self._text_beside(i) for i in drawn.tolist()]
        together = self._read([{"image": PICTURE, "text": text} for text in texts], tokens)
        meanings = self.taught_meanings[[self.row[text] for text in texts]]
        losses = towards(together, F.normalize(alone + meanings, dim=-1))
        return 0.5 * (losses["meaning"] + losses["alike"])

    def _text_beside(self, picture: int) -> str:
        own, kind = self.corpus.texts[picture], random.random()
        if own and kind < 0.4:
            return random.choice(own)
        return random.choice(self.corpus.requests if kind < 0.7 else self.taught_texts)

    def _pair_loss(self, size: int) -> Tensor:
        """Words and their gloss, or descriptions and their passage: each has its meaning, and they find each other."""
        start = random.randrange(len(self.pairs) - 4 * size)
        sides = list(zip(*random.sample(self.pairs[start : start + 4 * size], size), strict=True))
        rows = [[self.row[text] for text in side] for side in sides]
        read = [self._read([{"text": text} for text in side]) for side in sides]
        taught = [towards(vectors, self.taught_meanings[side]) for vectors, side in zip(read, rows, strict=True)]
        found = F.cross_entropy(read[0] @ read[1].T / 0.05, torch.arange(size))
        return 0.5 * sum(sum(losses.values()) for losses in taught) + 0.2 * found

    def _judged_losses(self, queries: int, negatives: int) -> Losses:
        """The margin of Yes over No selects the document that answers, and each answer is the right one."""
        judged = self.sampler.draw(queries, negatives, random)
        scored = self.reader.judge(judged, self.corpus, self.sampler.encoder.yes_no)
        scores, answers = (x.view(-1, 1 + negatives) for x in scored)
        chosen = F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long))
        return {"chosen": chosen, "judged": 0.3 * (answers[:, 0] + answers[:, 1:].mean(1)).mean()}

    def _read(self, items: list[Item], tokens: Tensor | None = None) -> Tensor:
        """The embedder's vectors of items, in the text teacher's space: (n, 384), unit norm.

        Args:
            tokens: visual tokens of the items' pictures.
        """
        return F.normalize(
            self.reader.items([self._encoded(item) for item in items], tokens) @ self.heads.basis, dim=-1
        )

    def _encoded(self, item: Item) -> EncodedItem:
        """As a document, or as a query with an instruction."""
        pictures = self.picture if "image" in item else ()
        if random.random() < 0.7:
            return self.encoder.encode(item, "document", pictures=pictures)
        query = item | {"instruction": random.choice(self.instructions)}
        return self.encoder.encode(query, "query", pictures=pictures)
