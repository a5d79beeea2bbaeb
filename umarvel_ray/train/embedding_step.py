"""One optimiser step of an embedder over all ranks, with a gradient cache (GradCache, arXiv 2101.06983).

1. Embed every item of this rank without a graph, in chunks under a token budget.
2. Gather all ranks' embeddings, compute the loss, keep its gradient with respect to this rank's embeddings and τ.
3. Embed each chunk again with a graph and push its rows of that gradient through.

The gradients of all ranks add up to the gradient of the loss on one rank; DeepSpeed averages over ranks, so step 3
multiplies by their number (rule 4). Dropout is seeded per (step, rank, chunk), so pass 3 sees the masks of pass 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from umarvel_ray.model.batch import collate, token_buckets
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.items import EncodedItem
from umarvel_ray.model.losses import gather_rows
from umarvel_ray.model.pictures import Picture

VisualOf = Callable[[Sequence[Picture]], dict[str, torch.Tensor]]
LossOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Passes:
    """How a step is cut up: tokens per chunk, whether to embed twice (cached) or once, and packed or padded rows."""

    token_budget: int
    cached: bool = True
    packed: bool = False


class TemperedEmbedder(torch.nn.Module):
    """What DeepSpeed wraps: embeddings and the clamped log-temperature leave one forward, so ZeRO-3 gathers both."""

    def __init__(self, embedder: EmbeddingModel, log_bounds: tuple[float, float]):
        super().__init__()
        self.embedder = embedder
        self.log_bounds = log_bounds

    def forward(self, batch, visual=None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.embedder(batch, visual), self.embedder.log_temperature.float().clamp(*self.log_bounds)


def embedding_step(
    engine: deepspeed.DeepSpeedEngine,
    queries: Sequence[EncodedItem],
    documents: Sequence[EncodedItem],
    loss_of: LossOf,
    passes: Passes,
    visual_of: VisualOf,
    seed: int,
) -> tuple[float, float]:
    """Accumulate the exact global gradient in `engine`; the caller steps it.

    Args:
        queries, documents: this rank's share of the global batch, each distinct document once.
        loss_of: (all queries (N, D), all documents (M, D), log τ, own rows) → this rank's share of the loss.
        visual_of: pictures → the frozen tower's output by picture key.
        seed: of this step, shared by all ranks.

    Returns:
        The global loss and τ.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    items = [*queries, *documents]
    chunks = equal_chunks([item.length for item in items], passes, engine.device)
    sizes = _sizes(len(queries), len(documents), engine.device)

    def forward(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(chunk_seed(seed, rank, number))
        chosen = [items[i] for i in chunks[number] or [0]]
        batch = collate(chosen, engine.device, passes.packed)
        vectors, log_temperature = engine(batch, visual_of(batch.pictures))
        return vectors[: len(chunks[number])], log_temperature

    embeddings: torch.Tensor | None = None
    outputs = []
    for number, chunk in enumerate(chunks):
        with torch.set_grad_enabled(not passes.cached):
            vectors, log_temperature = forward(number)
        if embeddings is None:
            embeddings = vectors.new_zeros(len(items), vectors.shape[1])
        outputs.append(vectors)
        embeddings[torch.tensor(chunk, dtype=torch.long, device=vectors.device)] = vectors.detach()

    leaf = embeddings.requires_grad_()
    tau = log_temperature.detach().requires_grad_()
    all_queries = gather_rows(leaf[: len(queries)], [q for q, _ in sizes])
    all_documents = gather_rows(leaf[len(queries) :], [d for _, d in sizes])
    start = sum(q for q, _ in sizes[:rank])
    loss = loss_of(all_queries, all_documents, tau, slice(start, start + len(queries)))
    loss.backward()

    for number, chunk in enumerate(chunks):
        vectors, log_temperature = forward(number) if passes.cached else (outputs[number], log_temperature)
        surrogate = (vectors * leaf.grad[torch.tensor(chunk, dtype=torch.long, device=vectors.device)]).sum()
        if number == len(chunks) - 1:
            surrogate = surrogate + (log_temperature * tau.grad).sum()
        engine.backward(surrogate * world)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item(), tau.detach().exp().item()


def equal_chunks(lengths: Sequence[int], passes: Passes, device: torch.device) -> list[list[int]]:
    """Token buckets, as many on every rank because ZeRO-3 gathers weights in lockstep: short ranks add empty ones."""
    chunks = token_buckets(lengths, passes.token_budget, passes.packed)
    most = torch.tensor(len(chunks), device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return chunks + [[] for _ in range(int(most) - len(chunks))]


def _sizes(queries: int, documents: int, device: torch.device) -> list[tuple[int, int]]:
    mine = torch.tensor([queries, documents], device=device)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return [(int(q), int(d)) for q, d in parts]


def chunk_seed(seed: int, rank: int, chunk: int) -> int:
    return (seed * 1_000_003 + rank * 10_007 + chunk) % (2**31)
