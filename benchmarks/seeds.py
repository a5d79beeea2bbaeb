"""The demo's ladder over several seeds: mean and range of every step's average recall, local and global.

python benchmarks/seeds.py 42 1 2      # runs `umarvel demo` for each seed that has no finished run yet
                                       → benchmarks/results/seeds.json
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from umarvel_ray.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "seeds.json"


def ladder_of(seed: int) -> list[dict]:
    """metrics.json of the demo with a seed; the run is made, or finished, first."""
    changes = [f"seed={seed}", f"output=runs/demo-seed-{seed}"]
    subprocess.run([Path(sys.executable).parent / "umarvel", "demo", *changes], check=True)
    return json.loads((load_recipe("demo", changes).run_dir / "report" / "metrics.json").read_text())["ladder"]


def main(seeds: list[int]) -> None:
    ladders = {seed: ladder_of(seed) for seed in seeds}
    machine = {
        "processor": platform.processor() or platform.machine(),
        **{name: version(name) for name in ("torch", "transformers", "ray", "deepspeed")},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "ladders": ladders}, indent=1) + "\n")
    steps = [row["step"] for row in ladders[seeds[0]]]
    for scope in ("local", "global"):
        tasks = ladders[seeds[0]][0][scope]
        print(f"\n| {scope}, mean of seeds {seeds} (range) | " + " | ".join(steps) + " |\n|---|" + "---:|" * len(steps))
        for task in tasks:
            values = [[ladders[seed][n][scope][task] for seed in seeds] for n in range(len(steps))]
            cells = (f"{sum(v) / len(v):.3f} ({max(v) - min(v):.3f})" for v in values)
            print(f"| {task} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [42, 1, 2])
