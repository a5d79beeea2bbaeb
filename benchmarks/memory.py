"""Peak memory of a command: the PSS of its whole process tree, Ray's daemons and shared memory included (Linux).

python -m benchmarks.memory umarvel demo          → benchmarks/results/memory.json
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil

from benchmarks.common.results import write_result

INTERVAL_S = 10.0  # a sample suspends every process it reads: sampled each second, the demo was a quarter slower


def tree_pss(process: psutil.Process) -> int:
    """Bytes, each shared page divided among the processes that map it."""
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
        time.sleep(INTERVAL_S)
    seconds = time.monotonic() - begin
    figures = {"command": command, "peak_gib": peak[0] / 2**30, "peak_at_s": peak[1], "seconds": seconds}
    write_result("memory", figures)
    print(f"peak PSS {figures['peak_gib']:.2f} GiB at {peak[1]:.0f} s of {seconds:.0f} s")
    return process.returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m benchmarks.memory COMMAND …")
    sys.exit(main(sys.argv[1:]))
