"""The three kinds of optimiser step: contrastive, distillation, reranking."""

from __future__ import annotations

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from umarvel_ray.data.plan import PlanStep
from umarvel_ray.data.stream import PairBatch, RankBatch
from umarvel_ray.model.distill import distillation_loss
from umarvel_ray.model.losses import info_nce
from umarvel_ray.train.embedding_step import LossOf, Passes, VisualOf, embedding_step
from umarvel_ray.train.jobs import TrainJob
from umarvel_ray.train.rerank_step import rerank_step


def run_step(
    engine: deepspeed.DeepSpeedEngine,
    job: TrainJob,
    batch: RankBatch | PairBatch,
    passes: Passes,
    visual_of: VisualOf,
) -> tuple[float, float, int]:
    """Accumulate one step's exact global gradient; returns the global loss, τ (0 for the reranker) and real tokens."""
    seed = job.seed + batch.plan.step
    if isinstance(batch, PairBatch):
        loss = rerank_step(engine, batch.pairs, len(batch.plan.query_ids), passes, visual_of, seed)
        return loss, 0.0, _total(sum(batch.lengths), engine.device)
    loss_of = _contrastive(batch.plan, job.two_way) if job.kind == "contrastive" else _distil(batch.plan)
    loss, temperature = embedding_step(engine, batch.queries, batch.documents, loss_of, passes, visual_of, seed)
    return loss, temperature, _total(sum(batch.lengths), engine.device)


def relevance(plan: PlanStep) -> np.ndarray:
    """(N, M) bool: the listed positives of each query of a contrastive step."""
    matrix = np.zeros((len(plan.query_ids), len(plan.document_ids)), dtype=bool)
    rows, columns = plan.arrays["relevant"].T
    matrix[rows, columns] = True
    return matrix


def _contrastive(plan: PlanStep, two_way: bool) -> LossOf:
    targets = torch.from_numpy(plan.arrays["targets"]).long()
    relevant = torch.from_numpy(relevance(plan))

    def loss_of(queries, documents, log_temperature, rows):
        device = queries.device
        return info_nce(queries, documents, targets.to(device), relevant.to(device), log_temperature, rows, two_way)

    return loss_of


def _distil(plan: PlanStep) -> LossOf:
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
