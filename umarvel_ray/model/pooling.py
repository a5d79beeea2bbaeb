"""From hidden states to one vector per item (method section 1.4)."""

from __future__ import annotations

import torch


def pool(hidden: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
    """Mean of the hidden states where the mask is True, in float32.

    "Last" pooling is the same mean over a mask that holds only the token before `<emb>`.

    Args:
        hidden: (B, L, D); pool_mask: bool (B, L), at least one True per row.

    Returns:
        float32 (B, D).
    """
    weights = pool_mask.to(torch.float32).unsqueeze(-1)
    # where, not a product: a padded position may hold anything, NaN included.
    kept = torch.where(pool_mask.unsqueeze(-1), hidden.float(), 0.0)
    return kept.sum(dim=1) / weights.sum(dim=1)
