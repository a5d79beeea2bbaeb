"""Distillation: loss and gradients against the formula, written out term by term in float64."""

import math

import numpy as np
import pytest
import torch

from umarvel_ray.model.distillation import distillation_loss, teacher_scores

LENGTHS = (5, 3, 1)  # real candidates per query; the third has nothing to learn from
TAU = 0.07


def _inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(len(LENGTHS), max(LENGTHS), generator=generator) * 2 - 1
    teacher = torch.rand(len(LENGTHS), max(LENGTHS), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return cosines, teacher, mask


def _written_out(cosines, teacher, student_tau, teacher_tau=TAU):
    """Σ p·ln(p/q) with plain exponentials, only over the real candidates, float64."""
    total = 0.0
    for row, length in enumerate(LENGTHS):
        p = [math.exp(teacher[row][k] / teacher_tau) for k in range(length)]
        q = [math.exp(cosines[row][k] / student_tau) for k in range(length)]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(LENGTHS)


def mean_loss(cosines, teacher, mask, log_temperature):
    losses = distillation_loss(cosines, teacher, mask, log_temperature)
    assert losses.shape == (len(cosines),)
    return losses.mean()


def test_loss_equals_the_written_out_formula():
    cosines, teacher, mask = _inputs()
    loss = mean_loss(cosines, teacher, mask, torch.tensor(math.log(TAU)))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_written_out(cosines.tolist(), teacher.tolist(), TAU), rel=1e-5)


def test_gradients_equal_finite_differences_with_the_teachers_temperature_fixed():
    cosines, teacher, mask = _inputs(1)
    log_temperature = torch.tensor(math.log(TAU), requires_grad=True)
    cosines.requires_grad_()
    teacher.requires_grad_()
    mean_loss(cosines, teacher, mask, log_temperature).backward()
    assert teacher.grad is None

    values, scores, delta = cosines.detach().double().numpy(), teacher.tolist(), 1e-6
    for row in range(len(LENGTHS)):
        for column in range(max(LENGTHS)):
            shift = np.zeros_like(values)
            shift[row, column] = delta
            slope = (_written_out(values + shift, scores, TAU) - _written_out(values - shift, scores, TAU)) / (
                2 * delta
            )
            assert cosines.grad[row, column].item() == pytest.approx(slope, abs=1e-4)
    up, down = TAU * math.exp(delta), TAU * math.exp(-delta)
    slope = (_written_out(values, scores, up) - _written_out(values, scores, down)) / (2 * delta)
    assert abs(slope) > 1e-2
    assert log_temperature.grad.item() == pytest.approx(slope, rel=1e-3)


def test_the_content_of_padding_does_not_matter():
    cosines, teacher, mask = _inputs(2)
    log_temperature = torch.tensor(math.log(TAU))
    noisy_cosines, noisy_teacher = cosines.clone(), teacher.clone()
    noisy_cosines[~mask], noisy_teacher[~mask] = 1e4, float("nan")
    noisy_cosines.requires_grad_()
    loss = mean_loss(noisy_cosines, noisy_teacher, mask, log_temperature)
    loss.backward()
    assert loss.item() == mean_loss(cosines, teacher, mask, log_temperature).item()
    assert torch.all(noisy_cosines.grad[~mask] == 0)
    assert torch.isfinite(noisy_cosines.grad).all()


def test_a_rank_without_queries_has_no_loss():
    nothing = torch.empty(0, 3)
    losses = distillation_loss(nothing, nothing, nothing.bool(), torch.tensor(0.0))
    assert losses.sum().item() == 0


def test_loss_is_zero_only_when_the_student_ranks_like_the_teacher():
    cosines, teacher, mask = _inputs(3)
    log_temperature = torch.tensor(math.log(TAU))
    # softmax ignores a constant, so a shifted teacher is a perfect student
    assert mean_loss(teacher - 0.3, teacher, mask, log_temperature).item() == pytest.approx(0.0, abs=1e-6)
    assert mean_loss(cosines, teacher, mask, log_temperature).item() > 0.1


def test_low_precision_scores_are_computed_in_fp32():
    cosines, teacher, mask = _inputs(4)
    cosines, teacher = cosines.bfloat16(), teacher.bfloat16()
    loss = mean_loss(cosines, teacher, mask, torch.tensor(math.log(TAU)))
    expected = _written_out(cosines.tolist(), teacher.tolist(), TAU)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_teacher_scores_are_the_convex_combination(alpha):
    cosines, p_yes = np.array([0.2, -0.4]), np.array([0.9, 0.1])
    expected = [alpha * 0.2 + (1 - alpha) * 0.9, alpha * -0.4 + (1 - alpha) * 0.1]
    np.testing.assert_allclose(teacher_scores(cosines, p_yes, alpha), expected)
    np.testing.assert_allclose(teacher_scores(torch.tensor(cosines), torch.tensor(p_yes), alpha).numpy(), expected)
