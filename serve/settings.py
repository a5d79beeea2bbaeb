"""What to serve, and within which limits: the `args` of config.yaml."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field

from umarvel_ray.errors import UserError


class Runtime(NamedTuple):
    """Where and how a model runs."""

    device: str
    dtype: str
    threads: int | None

    def set_threads(self) -> None:
        """Ray gives an actor's PyTorch as many threads as the logical CPUs it asked for, which says little."""
        torch.set_num_threads(self.threads or os.cpu_count() or 1)


class Limits(BaseModel):
    """What a client may send; what is over a limit is answered 400 or 413, with the number of the item."""

    model_config = ConfigDict(extra="forbid")

    max_items: int = Field(96, ge=1)  # as Cohere
    max_text: int = Field(32_768, ge=1)  # characters
    max_image_bytes: int = Field(20 * 2**20, ge=1)
    max_video_bytes: int = Field(50 * 2**20, ge=1)
    max_images: int = Field(8, ge=1)  # of one item


class Service(BaseModel):
    """What to serve. Without a reranker or an index the routes that need them answer 404."""

    model_config = ConfigDict(extra="forbid")

    embedder: str
    reranker: str | None = None
    index: str | None = None
    data: str = "builtin:demo"
    live: str | None = None  # folder of the documents that clients add; without it the index is read-only
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = Field(None, ge=1)  # of each model replica on a CPU; by default all cores
    rerank_weight: float = 1.0  # search score = cosine + weight · P(yes); evaluation prints the one it chose
    cache_mb: int = Field(256, ge=0)  # embeddings of items seen before, in each ingress replica
    limits: Limits = Limits()

    @property
    def runtime(self) -> Runtime:
        return Runtime(self.device, self.dtype, self.threads)


def from_environment(service: Service) -> Service:
    """UMARVEL_<FIELD> in the environment overrides a field; an empty value leaves that part out.

    Raises:
        UserError: a path does not exist.
    """
    given = {
        name: os.environ[f"UMARVEL_{name.upper()}"] or None
        for name in Service.model_fields
        if f"UMARVEL_{name.upper()}" in os.environ
    }
    service = Service.model_validate({**service.model_dump(), **given})
    for name in ("embedder", "reranker", "index"):
        path = getattr(service, name)
        if path and not Path(path).is_dir():
            raise UserError(f"serve: {name}: no folder {path}; run `make demo` first or set UMARVEL_{name.upper()}")
    return service
