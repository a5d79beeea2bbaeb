"""DeepSpeed's one C++ extension: the shared-memory all-reduce that it wants between CPU ranks.

`make setup` builds it into the installed package (DS_BUILD_SHM_COMM=1), so nothing is compiled when training starts.
Where DeepSpeed came without it, its first start compiles it, which needs a C++ compiler.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from umarvel_ray.errors import UserError

NAME = "deepspeed_shm_comm"


def require_compiled_op() -> None:
    """Raise UserError when DeepSpeed's CPU extension is neither built nor can be compiled here."""
    compiler = os.environ.get("CXX", "c++")
    if not _is_built() and shutil.which(compiler) is None:
        raise UserError(
            f"no C++ compiler '{compiler}', and DeepSpeed needs one to build {NAME} before it trains on CPUs; "
            "install g++ (Debian: apt-get install g++) and run `make setup` again"
        )


def _is_built() -> bool:
    deepspeed = find_spec("deepspeed")
    if deepspeed is None or deepspeed.origin is None:
        raise UserError("DeepSpeed is not installed; run `make setup`, or `pip install deepspeed`")
    prebuilt = Path(deepspeed.origin).parent / "ops" / "comm"
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    return any(prebuilt.glob(f"{NAME}_op*.so")) or any(cache.glob(f"**/{NAME}.so"))
