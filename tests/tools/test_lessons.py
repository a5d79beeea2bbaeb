"""What a base that continues is taught, and that it can be read as the embedder reads it."""

import random

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from tools.demo.base_model import HIDDEN
from tools.demo.corpus import read_corpus
from tools.demo.lessons import Lessons
from tools.demo.losses import Heads, towards
from tools.demo.pair_sampler import PairSampler
from tools.demo.reading import Reader
from tools.demo.teachers import PATCH_DIM
from tools.demo.views import TEACHER_DIM, VIEWS, Views
from tools.demo.vocabulary import ANSWER_LENGTH, lengthen
from umarvel_ray import demo

DICTIONARY = [(f"thing {n}", f"a thing with the number {n}") for n in range(40)]


@pytest.fixture(scope="module")
def lessons():
    corpus = read_corpus(demo.DATA, "validation")
    texts = {text for own in corpus.texts for text in own} | {text for pair in corpus.pairs for text in pair}
    texts |= {*corpus.requests} | {text for entry in DICTIONARY for text in entry}
    torch.manual_seed(0)
    meanings = dict(zip(sorted(texts), F.normalize(torch.randn(len(texts), 384), dim=-1), strict=True))
    pictures = torch.from_numpy(corpus.pictures)
    views = Views(
        [pictures] * VIEWS,
        [torch.zeros(1, 64, PATCH_DIM).expand(len(pictures), -1, -1)] * VIEWS,
        [torch.ones(1, 16, TEACHER_DIM).expand(len(pictures), -1, -1)] * VIEWS,
    )
    model = Qwen2VLForConditionalGeneration.from_pretrained(demo.BASE, dtype=torch.float32)
    model.get_input_embeddings().weight.requires_grad_(False)
    reader = Reader(model, AutoTokenizer.from_pretrained(demo.BASE))
    heads = Heads(torch.eye(HIDDEN, 384), model.config.vision_config.embed_dim)
    sampler = PairSampler(demo.DATA, "validation", corpus, demo.BASE, meanings)
    return Lessons(corpus, views, meanings, sampler, reader, heads, DICTIONARY)


def test_one_step_teaches_every_lesson(lessons):
    random.seed(0)
    losses = lessons.further()
    assert all(loss.isfinite() and loss > 0 for loss in losses.values()), losses
    sum(losses.values()).backward()
    untaught = {
        name
        for name, p in lessons.reader.model.model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    }
    assert untaught == set()


def test_a_picture_with_a_text_should_be_the_sum_of_both(lessons, monkeypatch):
    picture, meaning = lessons.taught_meanings[0], lessons.taught_meanings[5]
    monkeypatch.setattr(lessons, "_text_beside", lambda _: lessons.taught_texts[5])

    def loss(vector):
        monkeypatch.setattr(lessons, "_read", lambda items, tokens: F.normalize(vector[None], dim=-1))
        return lessons._parts_loss(torch.tensor([3]), torch.zeros(1, 16, HIDDEN), picture[None]).item()

    both = loss(picture + meaning)
    assert both == pytest.approx(0, abs=1e-5)
    assert min(loss(picture), loss(meaning)) > both + 0.5


def test_every_text_beside_a_picture_has_a_meaning(lessons):
    random.seed(0)
    beside = {lessons._text_beside(picture) for picture in range(300)}
    assert beside <= lessons.row.keys()
    assert beside & {*lessons.corpus.requests}


def test_towards_is_least_at_the_meanings_themselves():
    meanings = F.normalize(torch.randn(8, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    right, swapped = towards(meanings, meanings), towards(meanings.roll(1, 0), meanings)
    assert right["meaning"] == pytest.approx(0, abs=1e-5)
    assert swapped["meaning"] > 1
    assert swapped["alike"] > right["alike"] + 1


def test_answers_outweigh_their_neighbors():
    """A state that points at a short answer is closest to a longer neighbor, unless the answer is lengthened."""
    rows = torch.tensor([[0.3, 0.0], [0.54, 0.2], [0.0, 0.5]])
    assert (rows @ rows[0]).argmax() == 1
    lengthen(rows, [0])
    assert (rows @ rows[0]).argmax() == 0
    torch.testing.assert_close(rows[0], torch.tensor([ANSWER_LENGTH, 0.0]))
    torch.testing.assert_close(rows[1:], torch.tensor([[0.54, 0.2], [0.0, 0.5]]))
