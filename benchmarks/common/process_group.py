"""A process group of one rank, which DeepSpeed needs even for a single process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def start_process_group(device: torch.device) -> None:
    """NCCL on a GPU, gloo on a CPU."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
