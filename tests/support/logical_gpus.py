"""`python -m tests.support.logical_gpus GPUS WORD …`: `umarvel WORD …` with logical GPUs, computing on the CPU."""

from __future__ import annotations

import sys

from tests.support.placement import TorchConfig, launch, logical_ray
from umarvel_ray import cli
from umarvel_ray.inference import actors


def main(gpus: str, words: list[str]) -> int:
    actors.GPU_DEVICE = "cpu"
    launch.TorchConfig = lambda backend: TorchConfig("gloo")  # there is no NCCL without GPUs
    with logical_ray(4, int(gpus), 256 * 2**20):
        return cli.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
