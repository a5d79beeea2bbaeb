"""PyTorch's product of int8 matrices, and whether the CPU has instructions for it."""

from __future__ import annotations

from functools import partial

from umarvel_ray.compat.private import private

_torch = partial(private, "torch", ">=2.13,<2.14")
int8_matmul = _torch("torch", "_int_mm")
has_vnni = _torch("torch.cpu", "_is_vnni_supported")
