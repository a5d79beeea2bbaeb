"""Contrastive loss over a batch that is spread over ranks, exact to the last gradient (rules 4 and 6).

InfoNCE (paper eq. 1): L = −1/N Σ_i log( exp(s(q_i, d_i)/τ) / Σ_j exp(s(q_i, d_j)/τ) ), s = cosine, in fp32. Each rank
computes the rows of its own queries against the documents of all ranks; the sum over ranks is the loss on one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


def info_nce(
    queries: torch.Tensor,
    documents: torch.Tensor,
    targets: torch.Tensor,
    relevant: torch.Tensor,
    log_temperature: torch.Tensor,
    rows: slice,
    two_way: bool = False,
) -> torch.Tensor:
    """This rank's share of the global InfoNCE; shares add up to the mean over all N queries.

    Args:
        queries: (N, D) unit vectors of the global batch.
        documents: (M, D) unit vectors, each distinct document once.
        targets: (N,) column of each query's positive.
        relevant: (N, M) bool, every listed positive, or other document that is never counted as a negative.
        log_temperature: scalar, log τ.
        rows: the queries whose terms this rank computes.
        two_way: add the document → query direction for the same positives.
    """
    scale = torch.exp(-log_temperature.float())
    own = targets[rows]
    logits = queries[rows].float() @ documents.float().T * scale
    excused = relevant[rows].clone()
    excused[torch.arange(len(own)), own] = False
    loss = F.cross_entropy(logits.masked_fill(excused, -torch.inf), own, reduction="sum")
    if two_way:
        back = documents[own].float() @ queries.float().T * scale
        excused = relevant.T[own].clone()
        position = torch.arange(rows.start, rows.stop, device=own.device)
        excused[torch.arange(len(own)), position] = False
        loss = loss + F.cross_entropy(back.masked_fill(excused, -torch.inf), position, reduction="sum")
    return loss / len(queries)


class _GatherRows(torch.autograd.Function):
    """Concatenate every rank's rows; the backward pass sums over ranks the gradient of this rank's rows."""

    @staticmethod
    def forward(ctx, local: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.sizes = sizes
        width = max(sizes)
        padded = local.new_zeros(width, local.shape[1])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = sum(ctx.sizes[: dist.get_rank()])
        return grad[start : start + ctx.sizes[dist.get_rank()]], None


def gather_rows(local: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """(n_rank, D) on each of W ranks → (Σ n, D) on all, differentiable across ranks; `sizes` is n of each rank."""
    return local if len(sizes) == 1 else _GatherRows.apply(local, sizes)
