"""Attention over items packed one after another in a single row: each token sees its own item's tokens alone.

No token of padding is computed. The language model and the vision tower (whose items are frames or windows) call the
same function: on a GPU FlashAttention's kernel for sequences of varying length, as torch ships it; elsewhere, and in
float32, torch's attention on one item after the other, which is the exact reference. Padded batches go the usual way.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel

from umarvel_ray.compat.transformers import sdpa_attention_forward, use_attention

# transformers hands a tower's pictures over in one piece only to an attention with "flash" in its name.
ATTENTION = "umarvel_flash"
AMPERE = (8, 0)  # the oldest GPUs that FlashAttention runs on
# Before it had this argument, torch's kernel took fewer heads of keys than of queries without being told.
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


def is_packed(choice: bool | Literal["auto"], device: torch.device | str) -> bool:
    """Whether batches on a device are packed: "auto" packs on GPUs; a CPU is faster with batches of like lengths."""
    return torch.device(device).type == "cuda" if choice == "auto" else choice


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let a model of transformers read packed rows as well as padded batches."""
    use_attention(model, ATTENTION, attention_forward)


def packed_arguments(bounds: torch.Tensor, longest: int, causal: bool) -> dict[str, Any]:
    """What a language model's forward is told about a packed row, in transformers' own names."""
    ready = torch.empty(1, 1, 0, 0, device=bounds.device)  # four axes: passed on as it is, so no (T, T) mask is made
    return {
        "attention_mask": ready,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "is_causal": causal,
    }


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: packed where it is given bounds, else over padded rows.

    Args:
        query, key, value: (B, heads, L, d), one row when packed; cu_seq_lens_q: see `packed_attention`.

    Returns:
        (B, L, heads, d), and no weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    # Under autocast a trained norm gives queries and keys in float32; torch's own attention would cast them too.
    rows = [tensor.to(value.dtype).squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    return packed_attention(*rows, cu_seq_lens_q, max_length_q, is_causal, scaling).unsqueeze(0), None


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention within each item of a row.

    Args:
        query: (T, heads, d); key, value: (T, heads or a divisor of it, d); bounds: int32 (n + 1,), where items begin
            and end, from 0 to T; longest: the most tokens of an item.

    Returns:
        (T, heads, d).
    """
    if _has_kernel(query):
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(
            query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window, **GROUPED
        )
    items = zip(
        *(tensor.transpose(0, 1).split(bounds.diff().tolist(), dim=1) for tensor in (query, key, value)), strict=True
    )
    outputs = [F.scaled_dot_product_attention(*item, is_causal=causal, scale=scale, enable_gqa=True) for item in items]
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _has_kernel(query: torch.Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and torch.cuda.get_device_capability(query.device) >= AMPERE
