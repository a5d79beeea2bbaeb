"""The three kinds of optimiser step: contrastive, distillation, reranking."""

from __future__ import annotations

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from umarvel_ray.data.plan import PlanStep
from umarvel_ray.model.distillation import distillation_loss
from umarvel_ray.model.losses import info_nce
from umarvel_ray.model.vectors import truncate
from umarvel_ray.recipe import ContrastivePhase, DistillPhase
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
    """Accumulate one step's exact global gradient; returns the global loss, τ (0 for the reranker) and real tokens."""
    seed = spec.seed + batch.plan.step
    if isinstance(batch, RankPairs):
        loss = rerank_step(engine, batch.pairs, len(batch.plan.query_ids), passes, visual_of, seed)
        return loss, 0.0, _total(sum(batch.lengths), engine.device)
    loss_of = _loss_of(batch.plan, spec.phase)
    loss, temperature = embedding_step(engine, batch.queries, batch.documents, loss_of, passes, visual_of, seed)
    return loss, temperature, _total(sum(batch.lengths), engine.device)


def not_negatives(plan: PlanStep) -> np.ndarray:
    """(N, M) bool: what is no negative of each query of a contrastive step.

    Its listed positives; and all that is not its own where the plan lists each query's `own` negatives.
    """
    matrix = np.full((len(plan.query_ids), len(plan.document_ids)), "own" in plan.arrays)
    for name, value in (("own", False), ("relevant", True)):
        if name in plan.arrays:
            matrix[tuple(plan.arrays[name].T)] = value
    return matrix


def _loss_of(plan: PlanStep, phase: ContrastivePhase | DistillPhase) -> LossOf:
    return _contrastive(plan, phase) if isinstance(phase, ContrastivePhase) else _distillation(plan)


def _contrastive(plan: PlanStep, phase: ContrastivePhase) -> LossOf:
    """InfoNCE, or its mean over the dimensions that the phase trains, the whole included (arXiv 2205.13147, eq. 1)."""
    targets = torch.from_numpy(plan.arrays["targets"]).long()
    relevant = torch.from_numpy(not_negatives(plan))

    def loss_of(queries, documents, log_temperature, rows):
        device = queries.device
        given = (targets.to(device), relevant.to(device), log_temperature, rows, phase.two_way)
        dimensions = sorted({*phase.matryoshka, queries.shape[1]})
        return sum(info_nce(truncate(queries, d), truncate(documents, d), *given) for d in dimensions) / len(dimensions)

    return loss_of


def _distillation(plan: PlanStep) -> LossOf:
    candidates = torch.from_numpy(plan.arrays["candidates"]).long()
    teacher = torch.from_numpy(plan.arrays["teacher"])

    def loss_of(queries, documents, log_temperature, rows):
        index = candidates[rows].to(queries.device)
        cosines = torch.einsum("nd,nkd->nk", queries[rows].float(), documents.float()[index.clamp(min=0)])
        loss = distillation_loss(cosines, teacher[rows].to(queries.device), index >= 0, log_temperature)
        return loss * (len(index) / len(candidates))

    return loss_of


def _total(tokens: int, device: torch.device) -> int:
    count = torch.tensor(tokens, device=device)
    dist.all_reduce(count)
    return int(count)
