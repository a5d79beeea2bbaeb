"""One optimiser step of an embedder over all ranks, with a gradient cache (GradCache, arXiv 2101.06983).

1. Embed every item of this rank in chunks under a token budget; only the chunk embedded last keeps its graph.
2. Gather all ranks' embeddings, compute the loss, keep its gradient with respect to this rank's embeddings and τ.
3. Push that chunk's rows of this gradient through; then embed each other chunk again, with a graph, and push its rows
   through. No more than one chunk's graph is alive at a time, and a step of one chunk costs no second pass.

The gradients of all ranks add up to the gradient of the loss on one rank; DeepSpeed averages over ranks, so step 3
multiplies by their number (rule 4). Dropout is seeded per (step, rank, chunk), so pass 3 sees the masks of pass 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from umarvel_ray.items.encoder import EncodedItem
from umarvel_ray.items.pictures import Picture
from umarvel_ray.model.batch import collate, token_buckets
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.losses import gather_rows

VisualOf = Callable[[Sequence[Picture]], dict[str, torch.Tensor] | None]
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
        visual_of: pictures → the frozen tower's output by picture key; None has the model run its own tower.
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

    def rows_of(number: int) -> torch.Tensor:
        return torch.tensor(chunks[number], dtype=torch.long, device=engine.device)

    embeddings: torch.Tensor | None = None
    outputs = []
    # Backwards, because the first chunk is the fullest: its second pass is the one to save.
    for number in reversed(range(len(chunks))):
        with torch.set_grad_enabled(not passes.cached or number == 0):
            vectors, log_temperature = forward(number)
        if embeddings is None:
            embeddings = vectors.new_zeros(len(items), vectors.shape[1])
        outputs.append(vectors)
        embeddings[rows_of(number)] = vectors.detach()

    leaf = embeddings.requires_grad_()
    tau = log_temperature.detach().requires_grad_()
    all_queries = gather_rows(leaf[: len(queries)], [q for q, _ in sizes])
    all_documents = gather_rows(leaf[len(queries) :], [d for _, d in sizes])
    start = sum(q for q, _ in sizes[:rank])
    loss = loss_of(all_queries, all_documents, tau, slice(start, start + len(queries)))
    loss.backward()

    for number in range(len(chunks)):
        vectors = outputs.pop() if number == 0 or not passes.cached else forward(number)[0]
        surrogate = (vectors * leaf.grad[rows_of(number)]).sum()
        if number == 0:
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
