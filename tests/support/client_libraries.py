"""Other projects' clients, run in the environment that `make test-all` makes of requirements-clients.lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PYTHON = Path(sys.prefix) / "clients" / "bin" / "python"

needs_clients = pytest.mark.skipif(
    not PYTHON.exists(), reason="the clients of other projects are not installed; make test-all installs them"
)


def run_client(code: str, folder: Path, *arguments: str, **environment: str) -> Any:
    """What `code` prints last, as JSON. It runs in `folder`, which is also its home."""
    ran = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, "HOME": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])
