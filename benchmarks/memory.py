"""Peak memory of a command: PSS of its whole process tree, Ray's daemons and shared memory included (Linux).

python benchmarks/memory.py umarvel demo          → benchmarks/results/memory.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil

EVERY_S = 10.0  # a look holds up every process that is looked at: more of them, and the command takes longer
RESULTS = Path(__file__).parent / "results" / "memory.json"


def tree_pss(process: psutil.Process) -> int:
    """Bytes, each shared page divided among those who map it."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return total


def main(command: list[str]) -> int:
    begin = time.monotonic()
    process = psutil.Popen(command)
    peak = (0, 0.0)
    while process.poll() is None:
        peak = max(peak, (tree_pss(process), time.monotonic() - begin))
        time.sleep(EVERY_S)
    seconds = time.monotonic() - begin
    figures = {"command": command, "peak_gib": peak[0] / 2**30, "peak_at_s": peak[1], "seconds": seconds}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"peak PSS {figures['peak_gib']:.2f} GiB at {peak[1]:.0f} s of {seconds:.0f} s")
    return process.returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/memory.py COMMAND …")
    sys.exit(main(sys.argv[1:]))
