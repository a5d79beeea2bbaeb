"""Inference with the language model's linear layers in 8 bits: half of their memory in bfloat16."""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn

from umarvel_ray.errors import UserError

INT8 = "int8"


def compute_dtype(dtype: torch.dtype | str, device: torch.device | str) -> torch.dtype | str:
    """What everything is in that is not in 8 bits: activations and the other weights."""
    if dtype != INT8:
        return dtype
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def quantise(language_model: nn.Module) -> None:
    """Weights alone, with a scale for each row. Scales of activations would make an item's vector depend on what shares
    its batch.

    Raises:
        UserError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError("dtype int8 needs torchao; pip install 'umarvel-ray[int8]', or take float32 or bfloat16")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it names every extension that this machine cannot load
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(language_model, Int8WeightOnlyConfig())
