"""How far the base is, on validation concepts, which it never learns from."""

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo.corpus import Corpus, Turn
from tools.demo.drawing import patches_of
from tools.demo.judging import Judging
from tools.demo.lessons import Heads
from tools.demo.reading import Reader


class Exam:
    """Finding another drawing of the same concept; finding a picture's words through the temporary head; how much the
    right picture lowers a caption's loss against a wrong one; judging which document answers a query.

    Args:
        labels: (concept, its shortest description), to choose from; meanings: the text teacher's of them.
    """

    def __init__(self, corpus: Corpus, judging: Judging, labels: list[tuple[str, str]], meanings: Tensor) -> None:
        self.corpus, self.judging, self.labels, self.meanings = corpus, judging, labels, meanings

    @torch.no_grad()
    def figures(self, reader: Reader, heads: Heads) -> dict[str, float]:
        reader.model.eval()
        corpus = self.corpus
        tokens = torch.cat([reader.tower(patches_of(p))[1] for p in torch.from_numpy(corpus.pictures).split(128)])
        pooled = tokens.mean(1)
        said = F.normalize(heads.words(pooled), dim=-1) @ self.meanings.T
        right = torch.tensor([[c == label for label, _ in self.labels] for c in corpus.concepts])
        named = right.any(1)
        told = [i for i, own in enumerate(corpus.texts) if own][::3]
        turns = [Turn("What is this?", i, min(corpus.texts[i], key=len)) for i in told]
        wrong = told[len(told) // 2 :] + told[: len(told) // 2]
        own_loss, other_loss = (reader.answer_loss(turns, tokens[which], each=True) for which in (told, wrong))
        found = {
            "artist R@5": found_again(pooled, corpus.concepts),
            "words R@5": right.gather(1, said.topk(5).indices)[named].any(1).float().mean().item(),
            "words pool": len(self.labels),
            "caption loss": own_loss.mean().item(),
            "right picture wins": (own_loss < other_loss).float().mean().item(),
            "judged right": self._judged_right(reader),
        }
        reader.model.train()
        return {name: round(value, 4) for name, value in found.items()}

    def _judged_right(self, reader: Reader, queries: int = 400) -> float:
        """How often a document that answers scores above a random one of its task that does not (a half is chance)."""
        drawn, yes_no = self.judging.draw(queries, 1, random.Random(0)), self.judging.encoder.yes_no
        parts = [reader.judge(drawn[i : i + 40], self.corpus, yes_no)[0] for i in range(0, len(drawn), 40)]
        scores = torch.cat(parts).view(-1, 2)
        return (scores[:, 0] > scores[:, 1]).float().mean().item()


def found_again(vectors: Tensor, concepts: list[str]) -> float:
    """Share of pictures with another picture of their concept among their 5 nearest (centred cosine)."""
    vectors = F.normalize(vectors - vectors.mean(0), dim=-1)
    alike = (vectors @ vectors.T).fill_diagonal_(-2.0)
    same = torch.tensor([[a == b for b in concepts] for a in concepts]).fill_diagonal_(False)
    return same.gather(1, alike.topk(5).indices)[same.any(1)].any(1).float().mean().item()
