"""Makes a CUDA build of torchvision importable beside a CPU-only torch; `benchmarks.common` runs it on import.

torchvision's Python code refers to compiled operators that such an environment cannot load, so their names are declared
before transformers imports it. Its transforms and transformers' processors then work; calling one of those operators
does not.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def operator_names(source: str) -> set[str]:
    """The operators named by `@register_meta("…")` and `@torch.library.register_fake("torchvision::…")`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func).endswith(("register_meta", "register_fake"))]
    return {ast.literal_eval(call.args[0]).removeprefix("torchvision::") for call in calls}


def is_cuda_build(package: Path) -> bool:
    return "+cu" in (package / "version.py").read_text()


if (spec := importlib.util.find_spec("torchvision")) and spec.origin:
    import torch

    package = Path(spec.origin).parent
    if is_cuda_build(package) and torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")  # kept: its operators live as long as it does
        for name in operator_names((package / "_meta_registrations.py").read_text()):
            library.define(f"{name}(Tensor x) -> Tensor")
