"""Inference with the language model's linear layers in int8: half the memory of bfloat16, a quarter of float32.

On CPUs with VNNI, activations are quantized too, and the products are several times as fast as in float32. Elsewhere
the weights are converted for each product: that saves memory, not time.

Some channels of a language model's activations are hundreds of times as large as the others and would take all levels.
So blocks of channels are rotated first, weights and activations alike, which leaves products the same and spreads what
is large over its block (Ashkboos et al., QuaRot, 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch
from torch import nn
from torch.nn import functional

from umarvel_ray.compat.torch import has_vnni, int8_matmul
from umarvel_ray.errors import UserError

INT8 = "int8"
LARGEST = 127  # level; −128 is left out, so that the range is symmetric
BLOCK = (
    64  # channels that are rotated together; where it does not divide their number, the largest power of two that does
)

Model = TypeVar("Model", bound=nn.Module)


class Int8Linear(nn.Module):
    """A linear layer whose weight is stored as int8 `levels` (out, in) times a `scale` (out,).

    Each weight is off by at most scale / 2; levels are from −127 to 127. For int8 products weights are rotated, and so
    are activations, which get one scale per token: other items of the batch change none of it. But where a value lies
    between two levels, a rounding of float32 that depends on the batch may decide which one it gets.

    Args:
        rotated: for int8 products, on the CPU.
    """

    levels: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear, rotated: bool = False) -> None:
        super().__init__()
        self.rotated = rotated
        weight, dtype = linear.weight.detach().float(), linear.weight.dtype
        if rotated:
            weight = rotate(weight)
        scale = (weight.abs().amax(1) / LARGEST).clamp_min(torch.finfo(dtype).tiny).to(dtype)
        # In fp32: in steps of bfloat16, 127.3 is 127.5, which rounds to 128 and wraps to −128 in int8.
        levels = (weight / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST)
        self.register_buffer("levels", levels.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if self.rotated and states.device.type == "cpu":
            result = self._product(states)
        else:
            states = rotate(states) if self.rotated else states
            result = functional.linear(states, self.levels.to(states.dtype)) * self.scale
        return result if self.bias is None else result + self.bias

    def _product(self, states: torch.Tensor) -> torch.Tensor:
        tokens = rotate(states.reshape(-1, states.shape[-1]).float())
        scale = (tokens.abs().amax(1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        levels = (tokens / scale).round().to(torch.int8)
        result: torch.Tensor = int8_matmul(levels, self.levels.t()) * scale * self.scale.float()
        return result.to(states.dtype).reshape(*states.shape[:-1], len(self.levels))


def rotate(states: torch.Tensor) -> torch.Tensor:
    """States (…, channels), each block of channels times the same orthogonal matrix, Hadamard's."""
    size = math.gcd(states.shape[-1], BLOCK)
    rotated: torch.Tensor = states.unflatten(-1, (-1, size)) @ _hadamard(size).to(states)
    return rotated.flatten(-2)


@cache
@torch.inference_mode(False)
def _hadamard(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


@cache
def multiplies_int8() -> bool:
    """Whether PyTorch multiplies int8 by oneDNN with VNNI, exactly; its own loop is slower than float32."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and has_vnni()):
        return False
    most = torch.full((64, 64), LARGEST, dtype=torch.int8, device="cpu")
    return bool((int8_matmul(most, most) == 64 * LARGEST**2).all())  # oneDNN may be told not to use VNNI


def quantize(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Replace every linear layer in the model, which will run on `device`."""
    rotated = torch.device(device).type == "cpu" and multiplies_int8()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child, rotated))


def load_as(dtype: torch.dtype | str, device: torch.device | str, load: Callable[[torch.dtype | str], Model]) -> Model:
    """The model that `load` returns, in a PyTorch dtype or in "int8".

    With "int8", all but the linear layers of the language model is float32 on a CPU and bfloat16 on a GPU.

    Raises:
        UserError: no such dtype.
    """
    if dtype != INT8:
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise UserError(f"dtype {dtype!r}: give 'float32', 'bfloat16', 'float16' or 'int8'")
        return load(dtype)
    model = load(torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    quantize(model.get_submodule("backbone.model.language_model"), device)
    return model
