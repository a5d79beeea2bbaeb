"""InfoNCE over a batch that is spread over ranks, with the exact global gradient (docs/method.md#global-gradient).

L = −1/N Σ_i log( exp(s(q_i, d_i)/τ) / Σ_j exp(s(q_i, d_j)/τ) ) with s = cosine (paper eq. 1), in fp32; a listed
positive is never used as a negative. Each rank computes the rows of its own queries against the documents of all ranks;
the ranks' shares add up to the loss that one rank would compute.
"""

from __future__ import annotations

from typing import Any

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
    """This rank's share of the global InfoNCE loss; the shares add up to the mean over all N queries.

    Args:
        queries: (N, D) unit vectors of the global batch.
        documents: (M, D) unit vectors, each distinct document once.
        targets: int64 (N,), column of each query's positive.
        relevant: bool (N, M), True for every listed positive and every other document that is not a negative.
        log_temperature: scalar, log τ.
        rows: the queries whose terms this rank computes.
        two_way: add the document → query direction for the same positives.

    Returns:
        float32 scalar.
    """
    scale = torch.exp(-log_temperature.float())
    own = targets[rows]  # (n,), n of the N queries on this rank
    logits = queries[rows].float() @ documents.float().T * scale  # (n, M)
    excluded = relevant[rows].clone()
    excluded[torch.arange(len(own), device=own.device), own] = False
    loss = F.cross_entropy(logits.masked_fill(excluded, -torch.inf), own, reduction="sum")
    if two_way:
        back = documents[own].float() @ queries.float().T * scale  # (n, N)
        excluded = relevant.T[own].clone()
        diagonal = torch.arange(rows.start, rows.stop, device=own.device)
        excluded[torch.arange(len(own), device=own.device), diagonal] = False
        loss = loss + F.cross_entropy(back.masked_fill(excluded, -torch.inf), diagonal, reduction="sum")
    return loss / len(queries)


class _GatherRows(torch.autograd.Function):
    """Concatenate the rows of all ranks; backward sums the gradient of this rank's rows over ranks."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.sizes = sizes
        width = max(sizes)
        padded = local.new_zeros(width, local.shape[1])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        start = sum(ctx.sizes[: dist.get_rank()])
        return grad[start : start + ctx.sizes[dist.get_rank()]], None


def gather_rows(local: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """(n, D) on each rank → (Σ n, D) on all of them, differentiable across ranks; `sizes` holds n of each rank."""
    if len(sizes) == 1:
        return local
    gathered: torch.Tensor = _GatherRows.apply(local, sizes)
    return gathered
