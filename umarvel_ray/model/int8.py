"""Inference with the language model's linear layers in 8 bits: half of their memory in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

INT8 = "int8"

Model = TypeVar("Model", bound=nn.Module)


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 (out, in) times a scale for each row, at most half a step from the original.

    Activations are not quantized: their scales would make an item's vector depend on what shares its batch.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1).clamp_min(torch.finfo(linear.weight.dtype).tiny) / 127
        self.register_buffer("steps", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        result = functional.linear(states, self.steps.to(states.dtype)) * self.scale
        return result if self.bias is None else result + self.bias


def quantize(model: nn.Module) -> None:
    """Replace every linear layer in the model."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


def load_as(dtype: torch.dtype | str, device: torch.device | str, load: Callable[[torch.dtype | str], Model]) -> Model:
    """The model that `load` gives, in a dtype of PyTorch or in "int8": then activations and what is not quantized are
    float32 on a CPU, bfloat16 on a GPU."""
    if dtype != INT8:
        return load(dtype)
    model = load(torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    quantize(model.backbone.model.language_model)
    return model
