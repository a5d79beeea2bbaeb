"""The backbone, with the attention direction that the settings ask for; loading verifies that it took effect.

The model is transformers' own class for its family (`items/family.py`); nothing is forked. Old checkpoints, including
the authors', load as well: transformers renames `model.` and `visual.` itself, and their `sim.temp` is ignored.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from umarvel_ray.compat.transformers import attention_in_use
from umarvel_ray.errors import UserError
from umarvel_ray.items.family import read_model_config, without_deepstack
from umarvel_ray.items.template import load_tokenizer
from umarvel_ray.model.adapter import merge_adapter
from umarvel_ray.model.checkpoint import check_files
from umarvel_ray.model.packing import ATTENTION, packed_arguments, use_packed_attention
from umarvel_ray.recipe import ModelSettings

NEW_ROWS_SEED = 0


def load_backbone(
    path: str | Path, settings: ModelSettings, dtype: torch.dtype | str = torch.float32, quantized: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer on the CPU, in eval mode; an adapter is merged (see `merge_adapter`).

    Args:
        quantized: load the language model's linear layers in 4 bits (see `four_bit`), on the GPU if there is one.

    Raises:
        UserError: missing or truncated files, an unsupported architecture, attention that ignores the settings, or
            `quantized` without bitsandbytes.
    """
    check_files(path)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    transformers_logging.disable_progress_bar()
    config = read_model_config(path)
    config.text_config.is_causal = settings.attention == "causal"
    if not settings.deepstack:
        without_deepstack(config)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        str(path),
        config=config,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        quantization_config=four_bit(dtype) if quantized else None,
    )
    model, report = loaded
    # transformers would silently use random values for these.
    if bad := sorted(report["missing_keys"]) or [name for name, *_ in report["mismatched_keys"]]:
        raise UserError(f"{path}: no weights for '{bad[0]}' in the shape that config.json asks for; check both files")
    merge_adapter(model, Path(path))
    tokenizer = load_tokenizer(path)
    _grow_embeddings(model, len(tokenizer))
    model.eval()
    use_packed_attention(model)
    probe_attention(model, settings.attention)
    return model, tokenizer


def four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3), for the language model's linear layers only.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "language_model: qlora needs bitsandbytes; pip install 'umarvel-ray[qlora]', or train with lora"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


@torch.no_grad()
def probe_attention(model: PreTrainedModel, attention: str) -> None:
    """Change the second of two tokens: the first one's state must change exactly when attention is bidirectional.

    Checked without padding, with padding and packed, because libraries take different code paths for these
    (docs/method.md#causal-without-padding).

    Raises:
        UserError: the installed transformers does not honor `is_causal`.
    """
    core: Any = model
    language_model = core.model.language_model
    table: torch.Tensor = core.get_input_embeddings().weight  # (vocabulary, D)
    device = table.device
    inputs: list[tuple[list[int], dict[str, Any]]] = [
        ([], {"attention_mask": torch.tensor([[1, 1]], device=device)}),
        ([0], {"attention_mask": torch.tensor([[1, 1, 0]], device=device)}),
    ]
    if attention_in_use(model) == ATTENTION:
        bounds = torch.tensor([0, 2], dtype=torch.int32, device=device)
        inputs.append(([], packed_arguments(bounds, 2, attention == "causal")))
    for padding, arguments in inputs:
        states = []
        for second in (1, 2):
            embeds = table[[0, second, *padding]].unsqueeze(0)  # (1, 2 or 3, D)
            output = language_model(inputs_embeds=embeds, use_cache=False, **arguments)
            states.append(output.last_hidden_state[0, 0].float())
        changed = bool((states[0] - states[1]).abs().max() > 1e-6 * states[0].abs().max())
        if changed != (attention == "bidirectional"):
            raise UserError(
                f"attention '{attention}' did not take effect under transformers {transformers.__version__} with "
                f"'{attention_in_use(model)}' attention; install transformers>=5.2"
            )


def _grow_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """Grow the embedding table to `tokens` rows. New rows are random, the same on every worker, and never trained."""
    core: Any = model
    old = core.get_input_embeddings().num_embeddings
    if tokens <= old:
        return
    table = core.get_input_embeddings().weight
    mean, std = table.float().mean(0), table.float().std(0)
    noise = torch.randn(tokens - old, table.shape[1], generator=torch.Generator().manual_seed(NEW_ROWS_SEED))
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        core.get_input_embeddings().weight[old:] = (mean + std * noise.to(mean)).to(table.dtype)
