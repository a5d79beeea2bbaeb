"""The three kinds of optimizer step: contrastive, distillation and reranking."""

from __future__ import annotations

from typing import cast

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from umarvel_ray.data.plan import PlanStep
from umarvel_ray.model.distillation import distillation_loss
from umarvel_ray.model.losses import info_nce
from umarvel_ray.model.vectors import truncate
from umarvel_ray.recipe import ContrastivePhase, TrainingPhase
from umarvel_ray.train.embedding_step import LossOf, Passes, VisualOf, embedding_step
from umarvel_ray.train.phases import PhaseSpec
from umarvel_ray.train.rerank_step import rerank_step
from umarvel_ray.train.stream import RankItems, RankPairs


def run_step(
    engine: deepspeed.DeepSpeedEngine,
    spec: PhaseSpec,
    batch: RankItems | RankPairs,
    passes: Passes,
    visual_of: VisualOf,
) -> tuple[float, float, int]:
    """Accumulate one step's exact global gradient in `engine`; the caller takes the step.

    Returns:
        The global loss, τ (0 for the reranker), and the tokens of all ranks, padding excluded.
    """
    seed = spec.seed + batch.plan.step
    if isinstance(batch, RankPairs):
        loss = rerank_step(engine, batch.pairs, len(batch.plan.queries), passes, visual_of, seed)
        return loss, 0.0, _total(sum(batch.lengths), engine.device)
    loss_of = _loss_of(batch.plan, spec.phase)
    loss, temperature = embedding_step(engine, batch.queries, batch.documents, loss_of, passes, visual_of, seed)
    return loss, temperature, _total(sum(batch.lengths), engine.device)


def not_negatives(plan: PlanStep) -> np.ndarray:
    """bool (N, M): the documents that are not negatives of each query in a contrastive step.

    These are the query's listed positives and, if the plan lists each query's `own` negatives, all other documents.
    """
    matrix = np.full((len(plan.queries), len(plan.documents)), "own" in plan.arrays)
    for name, value in (("own", False), ("relevant", True)):
        if name in plan.arrays:
            matrix[tuple(plan.arrays[name].T)] = value
    return matrix


def _loss_of(plan: PlanStep, phase: TrainingPhase) -> LossOf:
    return _contrastive(plan, phase) if isinstance(phase, ContrastivePhase) else _distillation(plan)


def _contrastive(plan: PlanStep, phase: ContrastivePhase) -> LossOf:
    """InfoNCE; with `matryoshka`, its mean over those dimensions and the full one (arXiv 2205.13147, eq. 1)."""
    targets = torch.from_numpy(plan.arrays["targets"]).long()
    relevant = torch.from_numpy(not_negatives(plan))

    def loss_of(queries: Tensor, documents: Tensor, log_temperature: Tensor, rows: slice) -> Tensor:
        device = queries.device
        common = (targets.to(device), relevant.to(device), log_temperature, rows, phase.two_way)
        dimensions = sorted({*phase.matryoshka, queries.shape[1]})
        losses = (info_nce(truncate(queries, d), truncate(documents, d), *common) for d in dimensions)
        return cast(Tensor, sum(losses)) / len(dimensions)

    return loss_of


def _distillation(plan: PlanStep) -> LossOf:
    """KL from the teacher on each query's candidates; the ranks' shares add up to the mean over all queries."""
    candidates = torch.from_numpy(plan.arrays["candidates"]).long()  # (N, K) rows of documents, -1 on padding
    teacher = torch.from_numpy(plan.arrays["teacher"])  # (N, K)

    def loss_of(queries: Tensor, documents: Tensor, log_temperature: Tensor, rows: slice) -> Tensor:
        index = candidates[rows].to(queries.device)  # (n, K)
        cosines = torch.einsum("nd,nkd->nk", queries[rows].float(), documents.float()[index.clamp(min=0)])
        losses = distillation_loss(cosines, teacher[rows].to(queries.device), index >= 0, log_temperature)
        return losses.sum() / len(candidates)

    return loss_of


def _total(tokens: int, device: torch.device) -> int:
    """The sum over ranks."""
    count = torch.tensor(tokens, device=device)
    dist.all_reduce(count)
    return int(count)
