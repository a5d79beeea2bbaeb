"""The backbone: attention direction as a configuration value, checked at load (DESIGN.md rule 2).

The model is transformers' own class for its family (`family.py`); nothing is forked. Old checkpoints, the authors'
included, load too: transformers renames `model.` and `visual.` itself, and their `sim.temp` is left aside.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from umarvel_ray.compat.transformers import attention_in_use
from umarvel_ray.errors import UserError
from umarvel_ray.items.family import read_model_config, without_deepstack
from umarvel_ray.items.template import load_tokenizer
from umarvel_ray.model.checkpoint import check_files
from umarvel_ray.model.packing import ATTENTION, packed_arguments, use_packed_attention
from umarvel_ray.recipe import ModelSettings

NEW_ROWS_SEED = 0


def load_backbone(
    path: str | Path, settings: ModelSettings, dtype: torch.dtype | str = torch.float32, quantized: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load weights and tokenizer on the CPU, in eval mode.

    Args:
        quantized: the language model's linear layers in 4 bits, on the GPU where there is one (see `four_bit`).

    Raises:
        UserError: missing or truncated files, another architecture, attention that does not obey the settings; no
            bitsandbytes to quantize with.
    """
    check_files(path)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    transformers_logging.disable_progress_bar()
    config = read_model_config(path)
    config.text_config.is_causal = settings.attention == "causal"
    if not settings.deepstack:
        without_deepstack(config)
    model, report = AutoModelForImageTextToText.from_pretrained(
        str(path),
        config=config,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        quantization_config=four_bit(dtype) if quantized else None,
    )
    # transformers would go on with random values in their place.
    if bad := sorted(report["missing_keys"]) or [name for name, *_ in report["mismatched_keys"]]:
        raise UserError(f"{path}: no weights for '{bad[0]}' in the shape that config.json asks for; check both files")
    tokenizer = load_tokenizer(path)
    _make_room(model, len(tokenizer))
    model.eval()
    use_packed_attention(model)
    probe_attention(model, settings.attention)
    return model, tokenizer


def four_bit(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with quantized constants (QLoRA, arXiv 2305.14314, section 3), of the language model's linear layers alone.

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
    """Change the second of two tokens: the first one's state must move exactly when attention is bidirectional.

    Tried without padding, with it, and packed, because libraries take different paths there (trap T10).

    Raises:
        UserError: the installed transformers does not honour `is_causal`.
    """
    language_model = model.model.language_model
    table = model.get_input_embeddings().weight
    device = table.device
    forms = [([], {"attention_mask": torch.tensor([[1, 1]], device=device)})]
    forms.append(([0], {"attention_mask": torch.tensor([[1, 1, 0]], device=device)}))
    if attention_in_use(model) == ATTENTION:
        bounds = torch.tensor([0, 2], dtype=torch.int32, device=device)
        forms.append(([], packed_arguments(bounds, 2, attention == "causal")))
    for padding, form in forms:
        states = []
        for second in (1, 2):
            embeds = table[[0, second, *padding]].unsqueeze(0)
            output = language_model(inputs_embeds=embeds, use_cache=False, **form)
            states.append(output.last_hidden_state[0, 0].float())
        moved = bool((states[0] - states[1]).abs().max() > 1e-6 * states[0].abs().max())
        if moved != (attention == "bidirectional"):
            raise UserError(
                f"attention '{attention}' did not take effect under transformers {transformers.__version__} with "
                f"'{attention_in_use(model)}' attention; install transformers>=5.2"
            )


def _make_room(model: PreTrainedModel, tokens: int) -> None:
    """Grow the embedding table to `tokens` rows. The new rows are random, alike on every worker, and never trained."""
    old = model.get_input_embeddings().num_embeddings
    if tokens <= old:
        return
    table = model.get_input_embeddings().weight
    mean, std = table.float().mean(0), table.float().std(0)
    noise = torch.randn(tokens - old, table.shape[1], generator=torch.Generator().manual_seed(NEW_ROWS_SEED))
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[old:] = (mean + std * noise.to(mean)).to(table.dtype)
