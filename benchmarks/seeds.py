"""The demo's ladder over several seeds: mean and range of every checkpoint's recall, local and global.

Runs `umarvel demo` for each seed that has no finished run yet.

    python -m benchmarks.seeds 42 1 2      → benchmarks/results/seeds.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from umarvel_ray.recipe import load_recipe


def ladder_of(seed: int) -> list[dict]:
    """The ladder in the report of the demo with this seed; the run is started or resumed first."""
    changes = [f"seed={seed}", f"output=runs/demo-seed-{seed}"]
    subprocess.run([Path(sys.executable).parent / "umarvel", "demo", *changes], check=True)
    return json.loads((load_recipe("demo", changes).run_dir / "report" / "metrics.json").read_text())["ladder"]


def main(seeds: list[int]) -> None:
    ladders = {seed: ladder_of(seed) for seed in seeds}
    # Imported now: `memory.py` measures this process too, and these import torch.
    from benchmarks.common.results import print_table, write_result

    write_result("seeds", {"ladders": ladders})
    rows = ladders[seeds[0]]
    for scope in ("local", "global"):
        table = []
        for task in rows[0][scope]:
            values = [[ladders[seed][n][scope][task] for seed in seeds] for n in range(len(rows))]
            table.append((task, *(f"{sum(v) / len(v):.3f} ({max(v) - min(v):.3f})" for v in values)))
        print_table((f"{scope}, mean of seeds {seeds} (range)", *(row["step"] for row in rows)), table)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [42, 1, 2])
