"""Programs that want torchvision, whose only wheel is a CUDA build that breaks `import transformers` beside a CPU torch
unless a shim comes first: so in a process of their own, with the folder of `pip install --no-deps --target` in
UMARVEL_TORCHVISION and the shim beside the checkout (or in UMARVEL_SHARED)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("UMARVEL_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def run_with_torchvision(program: str) -> None:
    """Run it; a failure fails the test, no torchvision or no shim skips it."""
    folder = os.environ.get("UMARVEL_TORCHVISION")
    if not folder or not (SHARED / "tools/torchvision_cpu_shim.py").exists():
        pytest.skip("no UMARVEL_TORCHVISION folder, or no shim beside the checkout")
    head = f"import sys; sys.path[:0] = [{folder!r}, {str(SHARED / 'tools')!r}]\nimport torchvision_cpu_shim\n"
    done = subprocess.run([sys.executable, "-c", head + program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
