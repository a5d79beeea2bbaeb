"""The losses of each part of pretraining, on pictures, texts and questions drawn at random."""

import random
from collections import Counter, defaultdict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.demo.base_model import HIDDEN
from tools.demo.corpus import Corpus, Turn
from tools.demo.reading import Reader
from tools.demo.teachers import PATCH_DIM
from tools.demo.views import TEACHER_DIM, VIEWS, Views, disturb, patches_of

Losses = dict[str, Tensor]


class Heads(nn.Module):
    """Temporary heads from visual tokens and hidden states into the teachers' spaces; discarded afterwards.

    Args:
        basis: orthonormal rows (HIDDEN, 384), from the space of the word embeddings into the text teacher's.
        width: of a patch in the tower.
    """

    def __init__(self, basis: Tensor, width: int) -> None:
        super().__init__()
        self.basis: Tensor
        self.register_buffer("basis", basis)
        self.patches = nn.Linear(width, PATCH_DIM)
        self.cells = nn.Linear(HIDDEN, TEACHER_DIM)
        self.whole = nn.Linear(HIDDEN, TEACHER_DIM)
        self.artist = nn.Linear(HIDDEN, 128, bias=False)
        self.words = nn.Linear(HIDDEN, basis.shape[1])
        self.sentence = nn.Linear(HIDDEN, basis.shape[1])
        for head in (self.words, self.sentence):
            with torch.no_grad():
                head.weight.copy_(basis.T)
                head.bias.zero_()


class PretrainingLosses:
    """The losses of each part, by name.

    Args:
        meanings: the text teacher's unit vectors (384,) by text, for every description of a picture and other texts.
    """

    def __init__(
        self,
        corpus: Corpus,
        views: Views,
        meanings: dict[str, Tensor],
        reader: Reader,
        heads: Heads,
    ) -> None:
        self.corpus, self.views = corpus, views
        self.reader, self.heads = reader, heads
        named = [min(own, key=len) if own else "" for own in corpus.texts]
        self.keys = list(zip(corpus.concepts, named, strict=True))
        groups = defaultdict(list)
        for i, key in enumerate(self.keys):
            groups[key].append(i)
        self.groups = list(groups.values())
        per_concept = Counter(key[0] for key in groups)
        self.group_weights = [per_concept[key[0]] ** -0.4 for key in groups]
        self.concept_ids = torch.tensor([hash(c) for c in corpus.concepts])
        # The bank: every description of a picture once per concept it describes.
        described = sorted({text for own in corpus.texts for text in own})
        row = {text: i for i, text in enumerate(described)}
        self.text_rows = [[row[t] for t in own] for own in corpus.texts]
        self.meanings = torch.stack([meanings[text] for text in described])
        entries = sorted({(r, corpus.concepts[i]) for i, rows in enumerate(self.text_rows) for r in rows})
        self.bank_rows = torch.tensor([r for r, _ in entries])
        self.bank = self.meanings[self.bank_rows]
        self.bank_concepts = torch.tensor([hash(c) for _, c in entries])
        self.passages = [turn for turn in corpus.turns if turn.picture is None]
        self.captioned = [turn.picture for turn in corpus.turns if turn.prompt == "What is this?"]
        self.questions = defaultdict(list)
        for turn in corpus.turns:
            if turn.picture is not None and turn.prompt != "What is this?":
                self.questions[turn.picture].append(turn)
        self.taught_texts = sorted(meanings, key=len)  # texts of similar length share a batch
        self.taught_meanings = torch.stack([meanings[text] for text in self.taught_texts])

    def vision(self, pairs: int = 32) -> Losses:
        return self._tower_losses(torch.tensor(self._draw(pairs)))[0]

    def text(self) -> Losses:
        """Passages or answers to generate, and texts whose meaning the text teacher gives."""
        turns = random.choices(self.passages, k=20)
        generated = self.reader.answer_loss(
            [(t if random.random() < 0.5 else Turn("", None, t.answer)) for t in turns], None
        )
        return {"generated": generated, **self._meaning_losses(96)}

    def joint(self) -> Losses:
        losses, _, _ = self._picture_losses(pairs=24)
        return losses | {name: 0.5 * loss for name, loss in self._meaning_losses(24).items()}

    def _picture_losses(self, pairs: int, captions: int | None = None) -> tuple[Losses, Tensor, Tensor]:
        """Tower losses on drawn pictures and captions or answers on some; also returns their rows and visual tokens."""
        drawn = torch.tensor(self._draw(pairs))
        turns = [self._turn_about(i) for i in drawn.tolist()]
        losses, tokens = self._tower_losses(drawn)
        kept = [n for n, turn in enumerate(turns) if turn is not None][:captions]
        generated = self.reader.answer_loss([turns[n] for n in kept], tokens[kept])
        passages = self.reader.answer_loss(random.choices(self.passages, k=6), None)
        losses = {name: 0.5 * loss for name, loss in losses.items()}
        return losses | {"generated": generated, "text": 0.2 * passages}, drawn, tokens

    def _draw(self, pairs: int) -> list[int]:
        """Pictures in pairs that show the same thing; the same picture twice where there is only one."""
        chosen = []
        for group in random.choices(self.groups, weights=self.group_weights, k=pairs):
            chosen += random.sample(group, 2) if len(group) > 1 else [group[0], group[0]]
        return chosen

    def _tower_losses(self, chosen: Tensor) -> tuple[Losses, Tensor]:
        """Rows 2i and 2i + 1 of `chosen` show the same thing. Also returns the visual tokens."""
        view = [random.randrange(VIEWS) for _ in range(len(chosen))]
        drawn, inner, target = (
            torch.stack([kept[v][i] for v, i in zip(view, chosen.tolist(), strict=True)]).float()
            for kept in (self.views.pictures, self.views.patches, self.views.cells)
        )
        middle, tokens = self.reader.tower(patches_of(disturb(drawn)))
        pooled = tokens.mean(1)
        patches = F.mse_loss(self.heads.patches(middle), inner)
        cells = 1 - F.cosine_similarity(self.heads.cells(tokens), target, dim=-1).mean()
        whole = 1 - F.cosine_similarity(self.heads.whole(pooled), target.mean(1), dim=-1).mean()

        words = self._word_loss(chosen, self.heads.words(pooled))

        artist = self._partner_loss(chosen, self.heads.artist(pooled))
        losses = {"patches": 0.5 * patches, "cells": cells, "whole": whole}
        return losses | {"words": 0.4 * words, "artist": 0.4 * artist}, tokens

    def _partner_loss(self, chosen: Tensor, vectors: Tensor) -> Tensor:
        """Rows 2i and 2i + 1 of `vectors`, two drawings of one thing, select each other."""
        vectors = F.normalize(vectors, dim=-1)
        similarity = vectors @ vectors.T / 0.1
        partner = torch.arange(len(chosen)) ^ 1
        same = torch.tensor([hash(self.keys[i]) for i in chosen.tolist()])
        hidden = (same == same[:, None]) & (partner[:, None] != torch.arange(len(chosen)))
        return F.cross_entropy(similarity.masked_fill(hidden, -1e4), partner)

    def _word_loss(self, chosen: Tensor, predicted: Tensor) -> Tensor:
        """`predicted` (n, 384) selects each picture's words among all descriptions; similar meanings count in part."""
        concepts = self.concept_ids[chosen]
        rows = torch.tensor([random.choice(self.text_rows[i]) if self.text_rows[i] else -1 for i in chosen.tolist()])
        described = rows >= 0
        meaning = self.meanings[rows[described]]
        close = (meaning @ self.bank.T) / 0.05
        mine = self.bank_rows == rows[described][:, None]
        others = (
            self.bank_concepts == concepts[described][:, None]
        ) & ~mine  # the concept's other texts are correct too
        close = close.masked_fill(others, -1e4)
        target = 0.6 * mine / mine.sum(1, keepdim=True) + 0.4 * close.softmax(-1)
        scores = F.normalize(predicted[described], dim=-1) @ self.bank.T / 0.05
        return -(target * scores.masked_fill(others, -1e4).log_softmax(-1)).sum(-1).mean()

    def _meaning_losses(self, size: int) -> Losses:
        """Texts of similar length, read with full attention: the meaning of each, and their similarities."""
        rows = self._rows_of_similar_length(size)
        pooled = self.reader.texts([self.taught_texts[i] for i in rows])
        return towards(F.normalize(self.heads.sentence(pooled), dim=-1), self.taught_meanings[rows])

    def _rows_of_similar_length(self, size: int) -> list[int]:
        start = random.randrange(len(self.taught_texts) - 4 * size)
        return random.sample(range(start, start + 4 * size), size)

    def _turn_about(self, picture: int) -> Turn | None:
        texts = self.corpus.texts[picture]
        if not texts:
            return None
        kind = random.random()
        questions = self.questions.get(picture, [])
        if kind < 0.25 and questions:
            return random.choice(questions)
        if kind < 0.5:
            right = random.random() < 0.5
            other = random.choice(self.captioned)
            wrong = self.corpus.concepts[other] != self.corpus.concepts[picture]
            text = random.choice(texts if right or not wrong else self.corpus.texts[other])
            return Turn(f"Does the picture show this: {text}?", picture, "Yes" if right or not wrong else "No")
        return Turn(random.choice(("What is this?", "Describe the picture.", "")), picture, random.choice(texts))


def towards(predicted: Tensor, meanings: Tensor) -> Losses:
    """Unit vectors (n, 384) that should equal `meanings` and be as similar to each other."""
    target = (meanings @ meanings.T / 0.05).softmax(-1)
    alike = -(target * (predicted @ meanings.T / 0.05).log_softmax(-1)).sum(-1).mean()
    return {"meaning": 4 * (1 - (predicted * meanings).sum(-1).mean()), "alike": 0.3 * alike}
