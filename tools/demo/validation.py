"""Progress of the base on validation concepts, which it is never trained on."""

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo.corpus import Corpus, Turn
from tools.demo.losses import Heads
from tools.demo.pair_sampler import PairSampler
from tools.demo.reading import Reader
from tools.demo.views import PICTURE, patches_of
from umarvel_ray.items.item import Item


class Validation:
    """Retrieving another drawing of a concept, a picture's words (through the temporary head, and as the embedder
    does) and a text's passage; how often a caption's loss is lower with its own picture; and judging which document
    answers a query.

    Args:
        labels: (concept, its shortest description) to choose from.
        meanings: the text teacher's vectors of the labels.
    """

    def __init__(self, corpus: Corpus, sampler: PairSampler, labels: list[tuple[str, str]], meanings: Tensor) -> None:
        self.corpus, self.sampler, self.labels, self.meanings = corpus, sampler, labels, meanings

    @torch.no_grad()
    def figures(self, reader: Reader, heads: Heads) -> dict[str, float]:
        reader.model.eval()
        corpus = self.corpus
        tokens = torch.cat([reader.tower(patches_of(p))[1] for p in torch.from_numpy(corpus.pictures).split(128)])
        pooled = tokens.mean(1)
        predicted = F.normalize(heads.words(pooled), dim=-1) @ self.meanings.T
        embedded = self._embedded(reader, [{"image": PICTURE}] * len(tokens), tokens)
        labelled = embedded @ self._embedded(reader, [{"text": text} for _, text in self.labels]).T
        matches = torch.tensor([[c == label for label, _ in self.labels] for c in corpus.concepts])
        named = matches.any(1)
        captioned = [i for i, own in enumerate(corpus.texts) if own][::3]
        turns = [Turn("What is this?", i, min(corpus.texts[i], key=len)) for i in captioned]
        others = captioned[len(captioned) // 2 :] + captioned[: len(captioned) // 2]
        own_loss, other_loss = (reader.answer_loss(turns, tokens[which], each=True) for which in (captioned, others))
        figures = {
            "artist R@5": found_again(pooled, corpus.concepts),
            "words R@5": matches.gather(1, predicted.topk(5).indices)[named].any(1).float().mean().item(),
            "embedded words R@5": matches.gather(1, labelled.topk(5).indices)[named].any(1).float().mean().item(),
            "embedded artist R@5": found_again(embedded, corpus.concepts),
            "passages R@5": self._passages_found(reader),
            "words pool": len(self.labels),
            "caption loss": own_loss.mean().item(),
            "right picture wins": (own_loss < other_loss).float().mean().item(),
            "judged right": self._judged_right(reader),
        }
        reader.model.train()
        return {name: round(value, 4) for name, value in figures.items()}

    def _passages_found(self, reader: Reader) -> float:
        """Texts with their own passage among the five nearest."""
        asked, passages = (
            self._embedded(reader, [{"text": text} for text in side]) for side in zip(*self.corpus.pairs, strict=True)
        )
        near = (asked @ passages.T).topk(5).indices
        return (near == torch.arange(len(near))[:, None]).any(1).float().mean().item()

    def _embedded(self, reader: Reader, items: list[Item], tokens: Tensor | None = None) -> Tensor:
        """Documents as the embedder reads them, unit norm."""
        encoded = [self.sampler.encoder.items.encode(item, "document") for item in items]
        parts = range(0, len(items), 64)
        read = [reader.items(encoded[i : i + 64], None if tokens is None else tokens[i : i + 64]) for i in parts]
        return F.normalize(torch.cat(read), dim=-1)

    def _judged_right(self, reader: Reader, queries: int = 400) -> float:
        """How often a positive scores above a random negative of its task; chance is 0.5."""
        drawn, yes_no = self.sampler.draw(queries, 1, random.Random(0)), self.sampler.encoder.yes_no
        parts = [reader.judge(drawn[i : i + 40], self.corpus, yes_no)[0] for i in range(0, len(drawn), 40)]
        scores = torch.cat(parts).view(-1, 2)
        return (scores[:, 0] > scores[:, 1]).float().mean().item()


def found_again(vectors: Tensor, concepts: list[str]) -> float:
    """Share of pictures with another picture of their concept among their 5 nearest by centered cosine."""
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    similarity = (vectors @ vectors.T).fill_diagonal_(-2.0)
    same = torch.tensor([[a == b for b in concepts] for a in concepts]).fill_diagonal_(False)
    return same.gather(1, similarity.topk(5).indices)[same.any(1)].any(1).float().mean().item()
