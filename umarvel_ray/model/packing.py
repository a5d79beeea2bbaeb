"""Attention over items packed end to end in one row: each token attends only to its own item, without padding.

The language model and the vision tower (whose items are frames or windows) call the same function. On a GPU it is
FlashAttention's kernel for sequences of varying length, as torch ships it; on a CPU, or in float32, it is torch's
attention on one item after another, the exact reference. Padded batches use transformers' SDPA attention.
"""

from __future__ import annotations

from functools import cache, partial
from inspect import signature
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from umarvel_ray.compat.transformers import sdpa_attention_forward, use_attention

# transformers passes a tower's pictures in one piece only to an attention function with "flash" in its name.
ATTENTION = "umarvel_flash"
AMPERE = (8, 0)  # the oldest GPUs that FlashAttention runs on


def is_packed(choice: bool | Literal["auto"], device: torch.device | str) -> bool:
    """Whether to pack batches: "auto" packs on GPUs; on CPUs, padded rows of similar lengths are faster."""
    return torch.device(device).type == "cuda" if choice == "auto" else choice


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make a transformers model accept packed rows as well as padded batches."""
    use_attention(model, ATTENTION, attention_forward)


def packed_arguments(bounds: torch.Tensor, longest: int, causal: bool) -> dict[str, Any]:
    """Keyword arguments of a language model's forward for a packed row, by transformers' own names.

    Args:
        bounds: int32 (n + 1,); longest: tokens of the longest item.
    """
    no_mask = torch.empty(1, 1, 0, 0, device=bounds.device)  # 4-D masks are passed through, so no (T, T) mask is built
    return {
        "attention_mask": no_mask,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "is_causal": causal,
    }


def attention_forward(
    module: torch.nn.Module | SimpleNamespace,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls: packed if it gets `cu_seq_lens_q`, otherwise on padded rows.

    Args:
        query, key, value: (B, heads, L, d), B = 1 when packed.
        cu_seq_lens_q, max_length_q: `bounds` and `longest` of `packed_attention`.

    Returns:
        (B, L, heads, d), and no attention weights.
    """
    if cu_seq_lens_q is None:
        if key.shape[1] == 1 < query.shape[1]:
            # Where all heads share one key head without a copy, torch's memory-efficient kernel misreads the last query
            # of 64 k + 1 (pytorch issue 191937, seen on an H200 with torch 2.11).
            key, value = (tensor.repeat(1, query.shape[1], 1, 1) for tensor in (key, value))
            module = SimpleNamespace(num_key_value_groups=1, is_causal=getattr(module, "is_causal", True))
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return output
    # Under autocast a trained norm returns float32 queries and keys; torch's own attention would cast them as well.
    q, k, v = (tensor.to(value.dtype).squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # (L, heads, d)
    return packed_attention(q, k, v, cu_seq_lens_q, max_length_q, bool(is_causal), scaling).unsqueeze(0), None


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention within each of the n items of a row.

    Args:
        query: (T, heads, d).
        key, value: (T, key-value heads, d); their number divides `heads`.
        bounds: int32 (n + 1,), where items begin and end, from 0 to T.
        longest: tokens of the longest item.

    Returns:
        (T, heads, d).
    """
    if _has_kernel(query):
        window = (-1, 0) if causal else (-1, -1)
        output: torch.Tensor = _kernel()(
            query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=window
        )
        return output
    lengths = bounds.diff().tolist()
    by_item = (torch.split(tensor.transpose(0, 1), lengths, dim=1) for tensor in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)  # (heads, length, d)
        for q, k, v in zip(*by_item, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)


@cache
def _kernel() -> Any:
    """torch's own, which is imported with TorchDynamo, seconds that only GPUs should pay for."""
    from torch.nn.attention.varlen import varlen_attn

    # Versions of torch without this argument accept fewer key heads than query heads anyway.
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in signature(varlen_attn).parameters else varlen_attn


def _has_kernel(query: torch.Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and torch.cuda.get_device_capability(query.device) >= AMPERE
