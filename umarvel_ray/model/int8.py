"""Inference with the language model's linear layers in int8, which halves their memory compared with bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

from umarvel_ray.errors import UserError

INT8 = "int8"

Model = TypeVar("Model", bound=nn.Module)


class Int8Linear(nn.Module):
    """A linear layer whose weight is stored as int8 `levels` (out, in) times a `scale` (out,).

    Each weight is off by at most scale / 2; levels are from −127 to 127. Activations are not quantized: their scales
    would make an item's vector depend on the other items in its batch.
    """

    levels: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, dtype = linear.weight.detach().float(), linear.weight.dtype
        scale = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(dtype).tiny).to(dtype)
        # In fp32: in steps of bfloat16, 127.3 is 127.5, which rounds to 128 and wraps to −128 in int8.
        levels = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("levels", levels.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        result = functional.linear(states, self.levels.to(states.dtype)) * self.scale
        return result if self.bias is None else result + self.bias


def quantize(model: nn.Module) -> None:
    """Replace every linear layer in the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


def load_as(dtype: torch.dtype | str, device: torch.device | str, load: Callable[[torch.dtype | str], Model]) -> Model:
    """The model that `load` returns, in a PyTorch dtype or in "int8".

    With "int8", activations and all other weights are float32 on a CPU and bfloat16 on a GPU.

    Raises:
        UserError: no such dtype.
    """
    if dtype != INT8:
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise UserError(f"dtype {dtype!r}: give 'float32', 'bfloat16', 'float16' or 'int8'")
        return load(dtype)
    model = load(torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    quantize(model.get_submodule("backbone.model.language_model"))
    return model
