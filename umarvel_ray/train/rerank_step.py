"""One optimizer step of the reranker: mean next-token loss over all pairs of all ranks."""

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
    """Accumulate the gradient of the mean loss over the `total` pairs of the global batch; returns that loss.

    Args:
        pairs: this rank's share of the global batch.
        visual_of, seed: see `embedding_step`.
    """
    chunks = equal_chunks([pair.length for pair in pairs], passes, engine.device)
    share = torch.zeros((), device=engine.device)  # of the global loss
    for index, chunk in enumerate(chunks):
        torch.manual_seed(chunk_seed(seed, dist.get_rank(), index))
        batch = collate_pairs([pairs[i] for i in chunk or [0]], engine.device, passes.packed)
        losses = engine(batch, visual_of(batch.pictures))  # (len(chunk),), or (1,) if the chunk is empty
        loss = losses[: len(chunk)].sum() / total
        engine.backward(loss * dist.get_world_size())
        share += loss.detach()
    dist.all_reduce(share)
    return share.item()
