"""Where a result was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "ray", "sentence-transformers", "peft", "deepspeed")


def describe_machine() -> dict[str, Any]:
    """CPU model, cores, threads, GPU if there is one, and the versions of Python and the main packages."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **gpu,
        "python": platform.python_version(),
        **_versions(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
