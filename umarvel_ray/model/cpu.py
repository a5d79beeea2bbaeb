"""What a process that runs a model sets for its CPU: PyTorch's threads, and how glibc keeps memory."""

from __future__ import annotations

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
KEPT_BYTES = 256 * 2**20
LARGEST_KEPT = 32 * 2**20  # of one block: the most that every 64-bit glibc takes


def prepare_cpu(threads: int) -> None:
    """Use `threads` threads, and keep freed memory for the next batch.

    By default glibc hands large blocks back to the kernel, which clears them again, page by page, at their next use: a
    few percent of the time of embedding (docs/results.md). What is kept is at most about `KEPT_BYTES` at the heap's
    end, and holes in it.
    """
    torch.set_num_threads(threads)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl, nor on macOS
    if mallopt:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
