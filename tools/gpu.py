"""Everything that only a GPU can show, in one run of at most so many minutes; results are saved after each part.

    python -m tools.gpu --minutes 9 --out DIR        (or `make gpu`)

1. the tests marked `gpu`; 2. the whole demo on the GPU, its evaluation included; 3. `benchmarks/gpu.py` with the 2B and
the 7B shape; 4. with the time that is left, training with the recipe `small`, if there is one.

DIR gets parts.jsonl (a line for the machine, then one for each part), NAME.log for each part, and what the parts write.
A part that takes longer than its share of the time that is left is killed with its children, and the next one runs.
Run it from the repository, where the packages that umarvel-ray needs can be imported (`PYTHONPATH` suffices).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
LEAST = 20.0  # seconds: with less left, a part is not started
TO_KILL = 5.0  # seconds kept back for each kill
PACKAGES = ("torch", "transformers", "ray", "deepspeed", "peft")
DEMO = (
    "cluster.workers=1",
    "cluster.gpus_per_worker=1",
    "cluster.embedders=1",
    "cluster.gpus_per_embedder=1",
    "cluster.preprocess_tasks=4",
    "compute.dtype=bfloat16",
    "compute.token_budget=16384",
)


class Part(NamedTuple):
    """A command, and the largest share that it may take of the time left when it starts."""

    name: str
    command: list[str]
    share: float


def parts(out: Path) -> list[Part]:
    """The parts in order."""
    python = sys.executable

    def umarvel(verb: str, recipe: str, *changes: str) -> list[str]:
        return [python, "-m", "umarvel_ray.cli", verb, recipe, f"output={out / recipe}", *changes]

    def benchmark(size: str, *options: str) -> list[str]:
        return [python, "-m", "benchmarks.gpu", size, "--out", str(out / f"gpu-{size}.json"), "--rounds", "1", *options]

    found = [
        Part(
            "tests",
            [python, "-m", "pytest", "-m", "gpu", "-q", "tests/model/test_gpu.py", "tests/model/test_packing.py"],
            0.3,
        ),
        Part("demo", umarvel("demo", "demo", *DEMO), 0.55),
        Part(
            "benchmark-2b",
            benchmark("2b", "--items", "512", "--pairs", "48", "--only", "check,train,embed,memory"),
            0.6,
        ),
        Part("benchmark-7b", benchmark("7b", "--items", "256", "--pairs", "24", "--only", "check,train,embed"), 0.8),
    ]
    if (REPO / "umarvel_ray" / "recipes" / "small.yaml").exists():
        return [*found, Part("small", umarvel("train-stage1", "small", *DEMO[:4]), 1.0)]
    print("small: no recipe of that name; skipped", flush=True)
    return found


def run_parts(chosen: Sequence[Part], seconds: float, out: Path, clock: Callable[[], float] = time.monotonic) -> bool:
    """Run parts one after another within a time; returns whether every one ended well."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "parts.jsonl"
    record.write_text(json.dumps(describe()) + "\n")
    end, well = clock() + seconds, True
    for part in chosen:
        left = end - clock() - TO_KILL
        if left < LEAST:
            line: dict[str, Any] = {"part": part.name, "status": "no time left"}
        else:
            start = clock()
            status = _run(part.command, part.share * left, out / f"{part.name}.log")
            took = round(clock() - start, 1)
            line = {"part": part.name, "status": status, "seconds": took, "limit": round(part.share * left, 1)}
        well = well and line["status"] == 0
        with record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{part.name}: {line['status']}", flush=True)
    return well


def _run(command: list[str], limit: float, log: Path) -> int | str:
    """The exit status, or "killed at its limit"; the command has a process group of its own."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=REPO, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return "killed at its limit"
        finally:
            _kill_group(process)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process group: politely, so that Ray stops its daemons, then at once."""
    for number, wait in ((signal.SIGTERM, TO_KILL - 1), (signal.SIGKILL, 1.0)):
        end = time.monotonic() + wait
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < end:
                process.poll()
                os.killpg(process.pid, 0)  # raises when none is left
                time.sleep(0.05)
        except ProcessLookupError:
            return


def describe() -> dict[str, Any]:
    """The machine: GPU, driver, versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        gpu = "none found"
    return {"gpu": gpu, "cpus": os.cpu_count(), "python": platform.python_version(), **versions}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole run (9)")
    parser.add_argument("--out", type=Path, help="the folder for results; by default a new one in benchmarks/results")
    options = parser.parse_args(words)
    out = (options.out or RESULTS / time.strftime("gpu-run-%Y%m%d-%H%M%S")).absolute()
    if out.exists() and any(out.iterdir()):
        parser.error(f"{out} is not empty: what is finished in it would not be measured again; give another --out")
    return 0 if run_parts(parts(out), 60 * options.minutes, out) else 1


if __name__ == "__main__":
    sys.exit(main())
