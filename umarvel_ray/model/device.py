"""The device that a model runs on when the caller names none."""

from __future__ import annotations

import platform
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from umarvel_ray.errors import UserError
from umarvel_ray.items.item import Item

PROBE: Item = {"text": "a red square", "image": Image.new("RGB", (64, 64), "red")}
TOLERANCE = 0.05  # of the norm: bfloat16 rounds coarsely


def best_device() -> str:
    """A CUDA GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def require_device(device: torch.device | str) -> None:
    """Check that PyTorch has the device that a caller named.

    Raises:
        UserError: no such device, or a GPU that it does not see.
    """
    try:
        kind = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device {device!r}: not known to PyTorch; give 'cpu', 'cuda', 'cuda:1' or 'mps'") from None
    if kind.type == "cuda" and torch.cuda.is_available() and (kind.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {device}: PyTorch sees {torch.cuda.device_count()} GPUs; give one of them")
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device {device}: PyTorch {torch.__version__} sees no GPU on {platform.node()}; install its CUDA build "
            f"and a driver there, or use the CPU (cluster.gpus_per_embedder=0, device: cpu)"
        )


def checked_device(device: str, run: Callable[[str], np.ndarray]) -> str:
    """The device, but the CPU instead of an Apple GPU that cannot run the model or computes something else.

    Args:
        run: what the model computes for `PROBE` on a device.
    """
    if device != "mps":
        return device
    expected = run("cpu")
    try:
        found = run(device)
    except (RuntimeError, TypeError):  # an operation or a dtype that PyTorch lacks there
        return "cpu"
    agrees = np.linalg.norm(found - expected) <= TOLERANCE * np.linalg.norm(expected)
    return device if agrees else "cpu"
