"""InfoNCE against its formula written out; a listed positive is never a negative."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.support.synthetic import make_queries
from umarvel_ray.data.plan import PlanStep, contrastive_plan
from umarvel_ray.model.losses import info_nce
from umarvel_ray.ragged import Ragged
from umarvel_ray.recipe import ContrastivePhase
from umarvel_ray.train.steps import _contrastive, not_negatives


@pytest.fixture
def batch():
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
    documents = F.normalize(torch.randn(6, 8), dim=-1).requires_grad_()
    targets = torch.tensor([0, 2, 3, 5])
    relevant = torch.zeros(4, 6, dtype=torch.bool)
    relevant[torch.arange(4), targets] = True
    relevant[0, 2] = relevant[1, 4] = True
    return queries, documents, targets, relevant, torch.tensor([math.log(0.1)], requires_grad=True)


def formula(queries, documents, targets, relevant, log_temperature, two_way):
    s = queries.double() @ documents.double().T / log_temperature.double().exp()
    total = 0
    for i, t in enumerate(targets.tolist()):
        negatives = [j for j in range(6) if not relevant[i, j]]
        total = total - torch.log(s[i, t].exp() / (s[i, t].exp() + sum(s[i, j].exp() for j in negatives)))
        if two_way:
            negatives = [k for k in range(4) if not relevant[k, t]]
            total = total - torch.log(s[i, t].exp() / (s[i, t].exp() + sum(s[k, t].exp() for k in negatives)))
    return total / 4


@pytest.mark.parametrize("two_way", [False, True])
def test_value_and_gradients(batch, two_way):
    queries, documents, targets, relevant, tau = batch
    leaves = [queries, documents, tau]
    loss = info_nce(queries, documents, targets, relevant, tau, slice(0, 4), two_way)
    expected = formula(queries, documents, targets, relevant, tau, two_way)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for ours, truth in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("two_way", [False, True])
def test_the_ranks_shares_add_up(batch, two_way):
    queries, documents, targets, relevant, tau = batch
    whole = info_nce(queries, documents, targets, relevant, tau, slice(0, 4), two_way)
    parts = [info_nce(queries, documents, targets, relevant, tau, rows, two_way) for rows in (slice(0, 1), slice(1, 4))]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


@pytest.mark.parametrize("two_way", [False, True])
def test_a_positive_that_is_another_querys_target_gets_no_gradient(batch, two_way):
    """Document 2 is query 1's target and query 0's second positive: query 0's terms must not depend on it."""
    queries, documents, targets, relevant, tau = batch
    one = info_nce(queries, documents, targets, relevant, tau, slice(0, 1), two_way)
    (gradient,) = torch.autograd.grad(one, documents)
    assert torch.equal(gradient[2], torch.zeros(8))
    relevant = relevant.clone()
    relevant[0, 2] = False
    (gradient,) = torch.autograd.grad(
        info_nce(queries, documents, targets, relevant, tau, slice(0, 1), two_way), documents
    )
    assert gradient[2].abs().max() > 0


def test_without_in_batch_negatives_the_loss_covers_the_querys_own_negatives_only():
    """From the plan to the loss: other queries' documents do not count, neither their positives nor their negatives."""
    # Query i has the positive i, and mined documents from 10 · i + 10 on; one of them is another query's positive.
    positives = [[0], [1], [2], [3], [4], [5, 60]]
    mined = [[10 * i + 10, 10 * i + 11, (i + 1) % 6, 10 * i + 13] for i in range(6)]
    queries = make_queries(positives)
    phase = ContrastivePhase(queries="train", batch_size=6, max_steps=1, learning_rate=1e-3)
    [plan] = contrastive_plan(queries, phase, 0, np.arange(100), Ragged.of(mined), per_query=3, in_batch=False)
    torch.manual_seed(1)
    sides = [torch.randn(len(rows), 8, dtype=torch.float64) for rows in (plan.queries, plan.documents)]
    asked, shown = (F.normalize(side, dim=1) for side in sides)
    column = {document: j for j, document in enumerate(plan.documents.tolist())}
    tau, total = 0.2, 0.0
    for i, row in enumerate(plan.queries.tolist()):
        query = queries.rows.tolist().index(row)
        negatives = [document for document in mined[query][:3] if document not in positives[query]]
        above = math.exp(asked[i] @ shown[plan.arrays["targets"][i]] / tau)
        below = above + sum(math.exp(asked[i] @ shown[column[document]] / tau) for document in negatives)
        total -= math.log(above / below) / 6
    loss = info_nce(
        asked.float(),
        shown.float(),
        torch.from_numpy(plan.arrays["targets"]).long(),
        torch.from_numpy(not_negatives(plan)),
        torch.tensor(math.log(tau)),
        slice(0, 6),
    )
    assert loss.item() == pytest.approx(total, abs=1e-5)


def test_half_precision_vectors_are_compared_in_fp32(batch):
    queries, documents, targets, relevant, tau = batch
    loss = info_nce(queries.bfloat16(), documents.bfloat16(), targets, relevant, tau, slice(0, 4))
    exact = info_nce(queries.bfloat16().float(), documents.bfloat16().float(), targets, relevant, tau, slice(0, 4))
    assert loss.dtype == torch.float32
    assert loss.item() == exact.item()


@pytest.mark.parametrize("two_way", [False, True])
def test_matryoshka_is_the_mean_of_the_formula_over_shortened_vectors(batch, two_way):
    """arXiv 2205.13147, eq. 1, with equal weights that add up to one; the full dimension counts once."""
    queries, documents, targets, relevant, tau = batch
    phase = ContrastivePhase(queries="x", batch_size=4, learning_rate=1, matryoshka=(5, 3, 8), two_way=two_way)
    columns = [[i, j] for i in range(4) for j in range(6) if relevant[i, j]]
    arrays = {"targets": targets.numpy(), "relevant": np.array(columns)}
    plan = PlanStep(0, np.arange(4), np.arange(6), arrays)
    loss = _contrastive(plan, phase)(queries, documents, tau, slice(0, 4))
    expected = 0
    for width in (3, 5, 8):
        short = [queries, documents]  # unit vectors already
        if width < 8:
            short = [side[:, :width] / side[:, :width].norm(dim=1, keepdim=True) for side in short]
        expected = expected + formula(*short, targets, relevant, tau, two_way) / 3
    torch.testing.assert_close(loss.double(), expected[0] if expected.ndim else expected, atol=1e-6, rtol=1e-5)
    for actual, wanted in zip(
        *(torch.autograd.grad(x.sum(), (queries, documents, tau)) for x in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-4)
