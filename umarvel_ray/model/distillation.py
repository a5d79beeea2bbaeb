"""Stage 3: distillation of the recall-then-rerank teacher into the single embedder (docs/method.md#distillation).

The teacher scores a query's own top-k candidates with S = α·cosine + (1 − α)·P(yes). The loss is KL(p‖q) with
p = softmax(S / τ) and q = softmax(cosine / τ) over those candidates. τ gets its gradient through the student only: a
temperature that could also flatten the teacher would lower the loss without learning anything.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Scores = TypeVar("Scores", float, np.ndarray, Tensor)


def teacher_scores(cosines: Scores, p_yes: Scores, alpha: float) -> Scores:
    """α·cosine + (1 − α)·P(yes), elementwise."""
    return alpha * cosines + (1.0 - alpha) * p_yes


def distillation_loss(cosines: Tensor, teacher_scores: Tensor, mask: Tensor, log_temperature: Tensor) -> Tensor:
    """KL(teacher‖student) over each query's candidates; computed in fp32.

    Args:
        cosines: (B, K) student similarities, with gradient.
        teacher_scores: (B, K) fused scores on the cosine scale, without gradient.
        mask: (B, K) bool, True on real candidates, False on padding; at least one True per row.
        log_temperature: scalar, log τ.

    Returns:
        float32 (B,), one loss per query.
    """
    temperature = log_temperature.float().exp()
    student = _log_softmax(cosines.float() / temperature, mask)
    with torch.no_grad():
        teacher = _log_softmax(teacher_scores.float() / temperature, mask)
    # On padding both sides are −inf and their difference is NaN, which must not reach the sum.
    difference = (teacher - student).masked_fill(~mask, 0.0)  # (B, K)
    return (teacher.exp() * difference).sum(dim=1)


def _log_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask, float("-inf")).log_softmax(dim=1)
