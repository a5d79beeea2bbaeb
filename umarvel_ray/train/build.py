"""From a job to the module that DeepSpeed wraps, and from its trained state to a merged checkpoint directory."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from umarvel_ray.errors import UserError
from umarvel_ray.model.checkpoint import PROVENANCE, read_provenance, save_checkpoint
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.lora import merge_lora, save_adapter
from umarvel_ray.model.reranker import RerankerModel
from umarvel_ray.model.trainable import make_trainable
from umarvel_ray.train.embedding_step import TemperedEmbedder
from umarvel_ray.train.engine import hold_in_fp32, load_trainable
from umarvel_ray.train.jobs import TrainJob


def build_module(job: TrainJob, quantised: bool = False) -> TemperedEmbedder | RerankerModel:
    """The parent, made trainable as the step says; only that, and τ where it is learned, requires a gradient."""
    dtype = getattr(torch, job.engine.dtype)
    if job.kind == "rerank":
        reranker = RerankerModel.from_pretrained(job.parent, job.settings, dtype, quantised)
        make_trainable(reranker, job.step, job.seed)
        hold_in_fp32(reranker)
        _save_memory(reranker, job)
        reranker.train()
        return reranker
    model = EmbeddingModel.from_pretrained(job.parent, job.settings, dtype, initial_temperature(job), quantised)
    make_trainable(model, job.step, job.seed)
    _check_dimensions(job, model)
    model.log_temperature.requires_grad_(job.temperature.learn)
    hold_in_fp32(model)
    _save_memory(model, job)
    bounds = (math.log(job.temperature.minimum), math.log(job.temperature.maximum))
    module = TemperedEmbedder(model, bounds)
    module.train()
    return module


def model_of(module: TemperedEmbedder | RerankerModel) -> EmbeddingModel | RerankerModel:
    """The model without what only training adds."""
    return module.embedder if isinstance(module, TemperedEmbedder) else module


def _check_dimensions(job: TrainJob, model: EmbeddingModel) -> None:
    most = max(getattr(job.step, "matryoshka", ()), default=0)
    if most > model.dimension:
        raise UserError(f"{job.name}: matryoshka has {most}; the model's embeddings have {model.dimension} dimensions")


def _save_memory(model: EmbeddingModel | RerankerModel, job: TrainJob) -> None:
    if job.engine.activation_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})


def initial_temperature(job: TrainJob) -> float:
    """τ of the recipe, or the parent's where the recipe says 'parent'."""
    if job.temperature.init != "parent":
        return job.temperature.init
    value = read_provenance(job.parent)["temperature"]
    if value is None:
        raise UserError(f"{job.parent}/{PROVENANCE} holds no temperature; give {job.name} a number as temperature.init")
    return value


def save_merged(job: TrainJob, state: dict[str, torch.Tensor], metrics: dict[str, float]) -> None:
    """Put what was trained into the parent and write the checkpoint; adapters are merged, and kept beside it.

    The parent's weights are whole here, in the recipe's dtype, also where they trained as 4-bit copies.
    """
    module = build_module(job)
    load_trainable(module, state)
    model = model_of(module)
    if job.step.language_model != "full":
        save_adapter(model, job.step.lora, Path(job.output).parent / "adapters" / Path(job.output).name)
        merge_lora(model)
    record = {
        **job.provenance,
        "stage": job.name,
        "parent": job.parent,
        "step": job.step.model_dump(mode="json"),
        "metrics": metrics,
        "temperature": model.log_temperature.exp().item() if isinstance(model, EmbeddingModel) else None,
    }
    save_checkpoint(model, job.output, job.settings, record)
