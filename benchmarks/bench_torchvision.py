"""Lets the registry's torchvision, a CUDA build, be imported beside a CPU-only torch; import this before transformers.

Its Python code describes compiled operators that cannot be loaded here, so their names are declared first. Transforms
and processors work; calling one of those operators does not.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import torch


def described_operators(source: str) -> set[str]:
    """The operators named by `@register_meta("…")` and `@torch.library.register_fake("torchvision::…")`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func).endswith(("register_meta", "register_fake"))]
    return {ast.literal_eval(call.args[0]).removeprefix("torchvision::") for call in calls}


def is_cuda_build(package: Path) -> bool:
    return "+cu" in (package / "version.py").read_text()


if spec := importlib.util.find_spec("torchvision"):
    package = Path(spec.origin).parent
    if is_cuda_build(package) and torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in described_operators((package / "_meta_registrations.py").read_text()):
            library.define(f"{name}(Tensor x) -> Tensor")
