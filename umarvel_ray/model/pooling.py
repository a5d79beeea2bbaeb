"""From hidden states to one vector per item (docs/method.md#pooling)."""

from __future__ import annotations

import torch


def pool(hidden: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
    """Mean of the hidden states where the mask is True, in float32.

    "Last" pooling is the same mean with a mask of one token, the one before `<emb>`.

    Args:
        hidden: (B, L, D); pool_mask: bool (B, L), at least one True per row.

    Returns:
        float32 (B, D).
    """
    weights = pool_mask.to(torch.float32).unsqueeze(-1)
    # `where` rather than a product, because padding may hold anything, NaN included.
    kept = torch.where(pool_mask.unsqueeze(-1), hidden.float(), 0.0)  # (B, L, D)
    return kept.sum(dim=1) / weights.sum(dim=1)


def pool_packed(hidden: torch.Tensor, pool_mask: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """`pool` for items packed in one row.

    Args:
        hidden: (1, L, D); pool_mask: bool (1, L), at least one True per item; bounds: int32 (B + 1,).

    Returns:
        float32 (B, D).
    """
    mask, lengths = pool_mask[0], bounds.diff()
    item = torch.repeat_interleave(lengths, output_size=len(mask))  # (L,), index of each token's item
    kept = torch.where(mask.unsqueeze(-1), hidden[0].float(), 0.0)
    sums = kept.new_zeros(len(lengths), kept.shape[1]).index_add(0, item, kept)
    return sums / kept.new_zeros(len(lengths)).index_add(0, item, mask.float()).unsqueeze(-1)
