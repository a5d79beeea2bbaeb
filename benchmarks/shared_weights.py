"""How much memory a process that has loaded a checkpoint owns; the rest are the file's pages, shared by all processes.

python -m benchmarks.shared_weights      → benchmarks/results/shared_weights.json
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common.results import write_result
from benchmarks.common.small_model import SETTINGS, TEXT_MODEL, VISION_MODEL, make_model
from umarvel_ray import Embedder

WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}


def serve_until_closed(path: str) -> None:
    """A replica: load, embed once, report, and hold the model until stdin closes."""
    Embedder.from_pretrained(path, "cpu", settings=SETTINGS).encode_query(["warm-up"])
    print("ready", flush=True)
    sys.stdin.read()


def anonymous_mib(pid: int) -> float:
    """Memory that is not backed by a file and so not shared with another process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        model = make_model(Path(name) / "model", TEXT_MODEL | WIDE, VISION_MODEL | {"hidden_size": WIDE["hidden_size"]})
        weights = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 2**20
        command = [sys.executable, "-m", "benchmarks.shared_weights", str(model)]
        replica = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while replica.stdout.readline().strip() != "ready":
            pass
        own = anonymous_mib(replica.pid)
        replica.communicate("")
    print(f"weights {weights:.0f} MiB; a process that loaded them and embedded owns {own:.0f} MiB")
    write_result("shared_weights", {"weights_mib": weights, "own_mib": own})


if __name__ == "__main__":
    serve_until_closed(sys.argv[1]) if len(sys.argv) > 1 else main()
