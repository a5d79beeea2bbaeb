"""One optimizer step of an embedder over all ranks, with a gradient cache (GradCache, arXiv 2101.06983).

1. Split this rank's items into chunks under a token budget, the same number on every rank.
2. Embed the chunks without a graph, except for the one embedded last, which keeps its graph.
3. Gather the embeddings of all ranks and compute the loss and its gradient with respect to this rank's embeddings and
   log τ.
4. Backpropagate this gradient: through the graph that was kept, then through each other chunk, embedded again with a
   graph.

At most one chunk's graph is alive at a time, and a step of one chunk needs no second forward pass. Without the cache,
all chunks keep their graphs in 2. and none is embedded again in 4.

The gradients of all ranks add up to the gradient of the loss on one rank; DeepSpeed averages over ranks, so 4.
multiplies by their number. Dropout is seeded per (step, rank, chunk), so both forward passes draw the same masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

from umarvel_ray.items.encoder import EncodedItem
from umarvel_ray.items.pictures import Picture
from umarvel_ray.model.batch import ItemBatch, collate, token_buckets
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.losses import gather_rows

VisualOf = Callable[[Sequence[Picture]], dict[str, torch.Tensor] | None]
LossOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class Passes:
    """How a step is split up: tokens per chunk, with a gradient cache or without, and packed or padded rows."""

    token_budget: int
    cached: bool = True
    packed: bool = False


class TemperedEmbedder(torch.nn.Module):
    """What DeepSpeed wraps: one forward returns embeddings and clamped log-temperature, so that ZeRO-3 gathers both."""

    def __init__(self, embedder: EmbeddingModel, log_bounds: tuple[float, float]) -> None:
        super().__init__()
        self.embedder = embedder
        self.log_bounds = log_bounds

    def forward(
        self, batch: ItemBatch, visual: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors float32 (B, D) and log τ float32 (1,)."""
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
    """Accumulate the exact global gradient in `engine`; the caller takes the step.

    Args:
        queries, documents: this rank's share of the global batch, each distinct document once.
        loss_of: (all queries (N, D), all documents (M, D), log τ (1,), this rank's rows) → this rank's share of the
            loss.
        visual_of: pictures → the frozen tower's output by picture key; None makes the model run its own tower.
        seed: of this step, the same on all ranks.

    Returns:
        The global loss and τ.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    items = [*queries, *documents]  # n items on this rank

    # 1. Split into chunks.
    chunks = equal_chunks([item.length for item in items], passes, engine.device)
    sizes = _sizes(len(queries), len(documents), engine.device)

    def forward(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk's vectors (len(chunk), D) and log τ (1,)."""
        torch.manual_seed(chunk_seed(seed, rank, index))
        chosen = [items[i] for i in chunks[index] or [0]]
        batch = collate(chosen, engine.device, passes.packed)
        vectors, log_temperature = engine(batch, visual_of(batch.pictures))
        return vectors[: len(chunks[index])], log_temperature

    def rows_of(index: int) -> torch.Tensor:
        return torch.tensor(chunks[index], dtype=torch.long, device=engine.device)

    # 2. Embed the chunks, backwards: the first one is the fullest, so its second forward pass is the one to save.
    embeddings: torch.Tensor | None = None
    outputs = []
    for index in reversed(range(len(chunks))):
        with torch.set_grad_enabled(not passes.cached or index == 0):
            vectors, log_temperature = forward(index)
        if embeddings is None:
            embeddings = vectors.new_zeros(len(items), vectors.shape[1])  # (n, D)
        outputs.append(vectors)
        embeddings[rows_of(index)] = vectors.detach()

    assert embeddings is not None

    # 3. Compute the loss over all ranks and its gradient at this rank's embeddings and log τ.
    leaf = embeddings.requires_grad_()
    tau = log_temperature.detach().requires_grad_()
    all_queries = gather_rows(leaf[: len(queries)], [q for q, _ in sizes])  # (N, D)
    all_documents = gather_rows(leaf[len(queries) :], [d for _, d in sizes])  # (M, D)
    start = sum(q for q, _ in sizes[:rank])
    loss = loss_of(all_queries, all_documents, tau, slice(start, start + len(queries)))
    loss.backward()
    assert leaf.grad is not None
    assert tau.grad is not None

    # 4. Backpropagate it through each chunk: the surrogate's gradient is the gradient of the loss.
    for index in range(len(chunks)):
        vectors = outputs.pop() if index == 0 or not passes.cached else forward(index)[0]
        surrogate = (vectors * leaf.grad[rows_of(index)]).sum()
        if index == 0:
            surrogate = surrogate + (log_temperature * tau.grad).sum()
        engine.backward(surrogate * world)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item(), tau.detach().exp().item()


def equal_chunks(lengths: Sequence[int], passes: Passes, device: torch.device) -> list[list[int]]:
    """Token buckets of indices, padded with empty ones to the same number on every rank.

    Under ZeRO-3 ranks gather weights in lockstep, so each needs the same number of forward passes.
    """
    chunks = token_buckets(lengths, passes.token_budget, passes.packed)
    count = torch.tensor(len(chunks), device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return chunks + [[] for _ in range(int(count) - len(chunks))]


def chunk_seed(seed: int, rank: int, chunk: int) -> int:
    """Seed of a chunk's dropout masks."""
    return (seed * 1_000_003 + rank * 10_007 + chunk) % (2**31)


def _sizes(queries: int, documents: int, device: torch.device) -> list[tuple[int, int]]:
    """Numbers of queries and documents on each rank."""
    own = torch.tensor([queries, documents], device=device)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return [(int(q), int(d)) for q, d in parts]
