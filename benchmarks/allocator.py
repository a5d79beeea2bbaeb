"""What glibc's settings of `prepare_cpu` gain: bulk embedding with and without them, in processes that take turns.

python -m benchmarks.allocator [items=192] [rounds=5]    → benchmarks/results/allocator.json
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common.items import KINDS, ItemMaker
from benchmarks.common.results import integer_arguments, write_result
from benchmarks.common.small_model import SETTINGS, SHAPE, make_model
from benchmarks.common.timing import measure, median_ratio
from umarvel_ray import Embedder
from umarvel_ray.model.cpu import prepare_cpu

SIDES = ("default", "prepared")


def embed(side: str, folder: Path, items: int) -> None:
    """In a process of its own: print what embedding costs once everything is warm."""
    torch.set_num_threads(1)
    if side == "prepared":
        prepare_cpu(1)
    embedder = Embedder.from_pretrained(folder / "model", "cpu", settings=SETTINGS)
    with tempfile.TemporaryDirectory() as pictures:
        made = ItemMaker(Path(pictures) / "made").items(items)
        embedder.encode_document(made)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        times = measure(lambda: embedder.encode_document(made))
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(json.dumps(times | {"page_faults": faults}))


def main(items: int = 192, rounds: int = 5) -> None:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "model")
        for number in range(rounds):
            for side in SIDES[:: 1 if number % 2 else -1]:
                command = [sys.executable, "-m", "benchmarks.allocator", side, name, str(items)]
                process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[side].append(json.loads(process.stdout.splitlines()[-1]))
                print(f"  round {number + 1}, {side}: {found[side][-1]}", flush=True)
    medians = {
        side: {key: statistics.median(one[key] for one in rows) for key in rows[0]} for side, rows in found.items()
    }
    ratio = median_ratio(*([row["processor_seconds"] for row in found[side]] for side in SIDES))
    print(f"prepared: {ratio:.2f} times as fast by CPU time; {medians}")
    what = {"model": SHAPE, "items": f"{items}: {KINDS}"}
    write_result("allocator", what | {"medians": medians, "times_as_fast": ratio})


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in SIDES:
        embed(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(**integer_arguments(sys.argv[1:]))
