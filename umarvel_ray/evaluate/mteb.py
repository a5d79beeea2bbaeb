"""A checkpoint on MTEB and its multimodal tasks (mteb 2): queries carry the task's instruction, documents none.

    import mteb
    from umarvel_ray.evaluate.mteb import MtebEncoder

    mteb.evaluate(MtebEncoder("runs/demo/checkpoints/distillation"), mteb.get_tasks(tasks=["CIRRRetrieval"]))

mteb is no dependency: importing this without it raises a UserError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from umarvel_ray.errors import UserError
from umarvel_ray.model.checkpoint import CheckpointRef, read_provenance
from umarvel_ray.model.embedder import Embedder

try:
    from datasets import Video
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ModuleNotFoundError as error:
    raise UserError(f"{error.name} is not installed; run: pip install 'umarvel-ray[mteb]'") from None


class MtebEncoder(AbsEncoder):
    """mteb's `EncoderProtocol` over an `Embedder`.

    Args:
        model_name: a checkpoint.
        revision: for mteb's cache; default: a digest of the weights and settings.
        dtype: of the weights in memory.
        instructions: by task name, in place of mteb's own.

    Raises:
        UserError: not a checkpoint; missing or truncated files.
    """

    def __init__(
        self,
        model_name: str | Path,
        revision: str | None = None,
        *,
        device: str | None = None,
        dtype: str = "float32",
        instructions: Mapping[str, str] | None = None,
        **_: Any,
    ) -> None:
        self.model = Embedder.from_pretrained(model_name, device or "cpu", dtype)
        self.prompts_dict = dict(instructions or {})
        self.mteb_model_meta = _meta(Path(model_name), revision, self.model)

    def encode(
        self, inputs: Iterable[Mapping[str, list]], *, task_metadata: Any, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Embed what a task's loader yields: float32 (n, d), rows of unit norm.

        Tasks without sides (classification, clustering, similarity) embed every input as a query.
        """
        inputs = _undecoded(inputs)
        if prompt_type == PromptType.document:
            parts = [self.model.encode_document(_items(batch)) for batch in inputs]
        else:
            told = self.get_task_instruction(task_metadata, prompt_type)
            said = {"instruction": told} if isinstance(told, str) else {}  # mteb may hand on a dict of both sides
            parts = [self.model.encode_query([item | said for item in _items(batch)]) for batch in inputs]
        return np.concatenate([np.empty((0, self.model.dimension), dtype=np.float32), *parts])


def _undecoded(inputs: Iterable[Mapping[str, list]]) -> Iterable[Mapping[str, list]]:
    """A loader whose videos stay as they are stored: the embedder decodes them, where mteb would need torchcodec."""
    rows = getattr(inputs, "dataset", None)
    if not isinstance(getattr(rows, "features", {}).get("video"), Video):
        return inputs
    rows = rows.cast_column("video", Video(decode=False))
    return DataLoader(rows, inputs.batch_size, collate_fn=inputs.collate_fn, num_workers=inputs.num_workers)


def _items(batch: Mapping[str, list]) -> list[dict[str, Any]]:
    """The rows of a batch as items; a row with nothing in it, which benchmarks have, as a blank."""
    given = {key: batch[key] for key in ("text", "image", "video") if key in batch}
    if "video" in given:
        given["video"] = [stored and (stored["bytes"] or stored["path"]) for stored in given["video"]]
    rows = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]
    return [row if any(row.values()) else {"text": " "} for row in rows]


def _meta(path: Path, revision: str | None, model: Embedder) -> ModelMeta:
    recipe = read_provenance(path).get("recipe") or {}
    known = {
        "loader": MtebEncoder,
        "name": f"umarvel-ray/{recipe.get('name', 'checkpoint')}-{path.name}",
        "revision": revision or CheckpointRef.of(path).identity[:16],
        "n_parameters": sum(weights.numel() for weights in model.model.backbone.parameters()),
        "embed_dim": model.dimension,
        "max_tokens": model.encoder.settings.max_text_tokens,
        "modalities": ["text", "image", "video"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": True,
        "framework": ["PyTorch"],
    }
    return ModelMeta.create_empty(known)
