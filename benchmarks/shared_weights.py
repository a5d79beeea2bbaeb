"""How much of a loaded checkpoint is a process's own memory; the rest are the file's pages, which all processes share.

python benchmarks/shared_weights.py      → benchmarks/results/shared_weights.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import bench_model
from bench_model import RESULTS, SETTINGS, make_model

from umarvel_ray import Embedder

WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}


def hold(path: str) -> None:
    """A replica: load, embed, say so, wait to be ended."""
    Embedder.from_pretrained(path, settings=SETTINGS).encode_query(["warm-up"])
    print("ready", flush=True)
    sys.stdin.read()


def anonymous(pid: int) -> float:
    """MiB of memory that no file stands behind, so that no other process shares it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def main() -> None:
    bench_model.TEXT_MODEL |= WIDE
    bench_model.VISION_MODEL |= {"hidden_size": WIDE["hidden_size"]}
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name) / "model")
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**20
        command = [sys.executable, __file__, str(model)]
        replica = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while replica.stdout.readline().strip() != "ready":
            pass
        own = anonymous(replica.pid)
        replica.communicate("")
    print(f"weights {weights:.0f} MiB; a process that has loaded them and embedded: {own:.0f} MiB of its own")
    (RESULTS / "shared_weights.json").write_text(json.dumps({"weights_mib": weights, "own_mib": own}, indent=1) + "\n")


if __name__ == "__main__":
    hold(sys.argv[1]) if len(sys.argv) > 1 else main()
