"""Stage 3: the recall-then-rerank teacher distilled into the single embedder (method section 5).

The teacher's scores of a query's own top-k candidates are S = α·cosine + (1 − α)·P(yes); the loss is KL(p‖q) with
p = softmax(S / τ) and q = softmax(cosine / τ) over those candidates. τ learns through the student only: a temperature
that could also flatten the teacher would lower the loss without learning anything.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Scores = TypeVar("Scores")  # float, numpy array or tensor


def teacher_scores(cosines: Scores, p_yes: Scores, alpha: float) -> Scores:
    """The teacher: α·cosine + (1 − α)·P(yes), element by element."""
    return alpha * cosines + (1.0 - alpha) * p_yes


def distillation_loss(cosines: Tensor, teacher_scores: Tensor, mask: Tensor, log_temperature: Tensor) -> Tensor:
    """KL from teacher to student over each query's candidates, averaged over queries; computed in fp32.

    Args:
        cosines: (B, K) student similarities, with gradient.
        teacher_scores: (B, K) fused scores on the cosine scale; no gradient reaches them.
        mask: (B, K) bool, True on real candidates, False on padding; at least one True per row.
        log_temperature: scalar, log τ.
    """
    temperature = log_temperature.float().exp()
    student = _log_softmax(cosines.float() / temperature, mask)
    with torch.no_grad():
        teacher = _log_softmax(teacher_scores.float() / temperature, mask)
    # Padding is −inf on both sides and their difference NaN: out before it meets the sum.
    difference = (teacher - student).masked_fill(~mask, 0.0)
    return (teacher.exp() * difference).sum(dim=1).mean()


def _log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, float("-inf")).log_softmax(dim=1)
