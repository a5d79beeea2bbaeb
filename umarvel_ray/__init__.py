"""umarvel-ray: train, mine, rerank, distill, evaluate and serve a universal multimodal retriever on Ray.

`Embedder` and `Reranker` are imported on first use, so that `import umarvel_ray` and `umarvel --help` load no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from umarvel_ray.errors import UserError
from umarvel_ray.version import __version__

if TYPE_CHECKING:
    from umarvel_ray.model.embedder import Embedder
    from umarvel_ray.model.reranker import Reranker

__all__ = ["Embedder", "Reranker", "UserError", "__version__"]

_LAZY = {"Embedder": "umarvel_ray.model.embedder", "Reranker": "umarvel_ray.model.reranker"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'umarvel_ray' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name)
