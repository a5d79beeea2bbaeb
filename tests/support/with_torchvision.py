"""Run programs that need torchvision in a process of their own.

UMARVEL_TORCHVISION is a folder with torchvision (`pip install --no-deps --target`). A CUDA build breaks
`import transformers` beside a CPU build of torch unless a shim, tools/torchvision_cpu_shim.py in UMARVEL_SHARED, is
imported first.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("UMARVEL_SHARED", "nowhere"))


def run_with_torchvision(program: str) -> None:
    """Run a program; its failure fails the test, and without torchvision or the shim the test is skipped."""
    folder = os.environ.get("UMARVEL_TORCHVISION")
    if not folder or not (SHARED / "tools/torchvision_cpu_shim.py").exists():
        pytest.skip("torchvision not installed; set UMARVEL_TORCHVISION and UMARVEL_SHARED")
    head = f"import sys; sys.path[:0] = [{folder!r}, {str(SHARED / 'tools')!r}]\nimport torchvision_cpu_shim\n"
    done = subprocess.run([sys.executable, "-c", head + program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
