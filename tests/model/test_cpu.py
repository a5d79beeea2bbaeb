"""Memory that a batch frees is kept for the next one; the settings are the process's, hence a process of its own."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

ALLOCATE = """
import ctypes, json, sys, torch
from umarvel_ray.model.cpu import prepare_cpu

class Info(ctypes.Structure):  # mallinfo2(3)
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

info = ctypes.CDLL(None).mallinfo2
info.restype = Info
if sys.argv[1] == "prepared":
    prepare_cpu(1)
    assert torch.get_num_threads() == 1
before = info().hblks
blocks = [torch.ones(2 * 2**20) for _ in range(16)]  # 128 MiB
own = info().hblks - before
del blocks
print(json.dumps({"mapped one by one": own, "kept": info().fordblks >= 128 * 2**20}))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc, or one before 2.33")
def test_freed_memory_is_kept():
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    found = {
        how: json.loads(
            subprocess.run([sys.executable, "-c", ALLOCATE, how], env=own, stdout=subprocess.PIPE, check=True).stdout
        )
        for how in ("default", "prepared")
    }
    assert found["prepared"] == {"mapped one by one": 0, "kept": True}
    assert found["default"] != found["prepared"]
