"""One optimiser step of the reranker: mean next-token loss over all pairs of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import deepspeed
import torch
import torch.distributed as dist

from umarvel_ray.items.pair_encoder import EncodedPair
from umarvel_ray.model.batch import collate_pairs
from umarvel_ray.train.embedding_step import Passes, VisualOf, chunk_seed, equal_chunks


def rerank_step(
    engine: deepspeed.DeepSpeedEngine,
    pairs: Sequence[EncodedPair],
    total: int,
    passes: Passes,
    visual_of: VisualOf,
    seed: int,
) -> float:
    """Accumulate the gradient of the mean loss over the `total` pairs of the global batch; returns that loss."""
    chunks = equal_chunks([pair.length for pair in pairs], passes, engine.device)
    mine = torch.zeros((), device=engine.device)
    for number, chunk in enumerate(chunks):
        torch.manual_seed(chunk_seed(seed, dist.get_rank(), number))
        batch = collate_pairs([pairs[i] for i in chunk or [0]], engine.device, passes.packed)
        losses = engine(batch, visual_of(batch.pictures))
        loss = losses[: len(chunk)].sum() / total
        engine.backward(loss * dist.get_world_size())
        mine += loss.detach()
    dist.all_reduce(mine)
    return mine.item()
