"""A checkpoint on MTEB and its multimodal tasks (mteb 2): queries carry the task's instruction, documents none.

    import mteb
    from umarvel_ray.evaluate.mteb import MtebEncoder

    mteb.evaluate(MtebEncoder("runs/demo/checkpoints/distillation"), mteb.get_tasks(tasks=["CIRRRetrieval"]))

mteb is an optional dependency: this module imports without it, and `MtebEncoder` then says what to install.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from umarvel_ray.errors import UserError
from umarvel_ray.model.checkpoint import PROVENANCE, CheckpointRef, read_provenance
from umarvel_ray.model.embedder import Embedder
from umarvel_ray.model.hub import model_folder

MISSING: str | None = None  # the package that is not installed
try:
    from datasets import Video
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ModuleNotFoundError as error:
    MISSING, AbsEncoder = error.name, object


class MtebEncoder(AbsEncoder):
    """mteb's `EncoderProtocol` over an `Embedder`.

    Args:
        model_name: a checkpoint's directory or its id on the Hugging Face Hub.
        revision: of the model on the Hub; for a directory, the name of this model in mteb's cache (by default a digest
            of its weights and settings).
        device: by default the best one (see `Embedder.from_pretrained`).
        dtype: of the weights in memory.
        preset: the system that released the model, if it is none of umarvel-ray's (see `Embedder.from_pretrained`).
        instructions: by task name, instead of mteb's own.

    Raises:
        UserError: mteb is not installed; not a checkpoint; missing or truncated files.
    """

    def __init__(
        self,
        model_name: str | Path,
        revision: str | None = None,
        *,
        device: str | None = None,
        dtype: str = "float32",
        preset: str | None = None,
        instructions: Mapping[str, str] | None = None,
        **_: Any,
    ) -> None:
        if MISSING:
            raise UserError(f"{MISSING} is not installed; run: pip install 'umarvel-ray[mteb]'")
        folder = model_folder(model_name, revision)
        self.model = Embedder.from_pretrained(folder, device, dtype, preset=preset)
        self.prompts_dict = dict(instructions or {})
        self.mteb_model_meta = _meta(folder, Path(model_name).name, revision, self.model)

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
            instruction = self.get_task_instruction(task_metadata, prompt_type)
            prompt = instruction if isinstance(instruction, str) else None  # mteb may pass a dict of both sides
            parts = [self.model.encode_query(_items(batch), prompt) for batch in inputs]
        return np.concatenate([np.empty((0, self.model.dimension), dtype=np.float32), *parts])


def _undecoded(inputs: Any) -> Iterable[Mapping[str, list]]:
    """The loader with videos as they are stored: the embedder decodes them, for which mteb would need torchcodec."""
    rows: Any = getattr(inputs, "dataset", None)
    if not isinstance(getattr(rows, "features", {}).get("video"), Video):
        return inputs
    rows = rows.cast_column("video", Video(decode=False))
    return DataLoader(rows, inputs.batch_size, collate_fn=inputs.collate_fn, num_workers=inputs.num_workers)


def _items(batch: Mapping[str, list]) -> list[dict[str, Any]]:
    """The rows of a batch as items. Benchmarks have empty rows, which become a blank text."""
    columns = {key: batch[key] for key in ("text", "image", "video") if key in batch}
    if "video" in columns:
        columns["video"] = [stored and (stored["bytes"] or stored["path"]) for stored in columns["video"]]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [row if any(row.values()) else {"text": " "} for row in rows]


def _meta(folder: Path, name: str, revision: str | None, model: Embedder) -> ModelMeta:
    recipe = read_provenance(folder).get("recipe") or {} if (folder / PROVENANCE).is_file() else {}
    known = {
        "loader": MtebEncoder,
        "name": f"umarvel-ray/{recipe.get('name', 'checkpoint')}-{name}",
        "revision": revision or CheckpointRef.of(folder, model.encoder.settings).identity[:16],
        "n_parameters": sum(weights.numel() for weights in model.model.backbone.parameters()),
        "embed_dim": model.dimension,
        "max_tokens": model.encoder.settings.longest,
        "modalities": ["text", "image", "video"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": True,
        "framework": ["PyTorch"],
    }
    return ModelMeta.create_empty(known)
