"""transformers' attention functions, and the configuration entry that names the one in use."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from umarvel_ray.compat.private import private

_transformers = partial(private, "transformers", ">=5.17,<5.24")
sdpa_attention_forward = _transformers("transformers.integrations.sdpa_attention", "sdpa_attention_forward")
_sdpa_mask = _transformers("transformers.masking_utils", "sdpa_mask")
_transformers("transformers", "PreTrainedConfig._attn_implementation")


def use_attention(model: PreTrainedModel, name: str, function: Any) -> None:
    """Make a model call `function`, registered as `name`, for attention; its masks are those of SDPA."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _sdpa_mask)
    model.config._attn_implementation = name


def attention_in_use(model: PreTrainedModel) -> str:
    """The name of the attention function that the language model calls."""
    return model.config.text_config._attn_implementation
