"""From a phase to the module that DeepSpeed wraps, and from its trained state to a merged checkpoint directory."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from umarvel_ray.errors import UserError
from umarvel_ray.items.pair_encoder import PairEncoder
from umarvel_ray.model.checkpoint import PROVENANCE, read_provenance, save_checkpoint
from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.model.lora import merge_lora, save_adapter
from umarvel_ray.model.reranker import RerankerModel
from umarvel_ray.model.trainable import make_trainable
from umarvel_ray.recipe import ContrastivePhase, RerankPhase, Temperature
from umarvel_ray.train.embedding_step import TemperedEmbedder
from umarvel_ray.train.engine import hold_in_fp32, load_trainable
from umarvel_ray.train.phases import PhaseSpec

Module = TemperedEmbedder | RerankerModel


def build_module(spec: PhaseSpec, quantized: bool = False) -> Module:
    """The parent model, trainable as the phase specifies; nothing else, except a learned τ, requires a gradient.

    Raises:
        UserError: the parent cannot be loaded, has no temperature, or has fewer dimensions than `matryoshka` asks for.
    """
    dtype = getattr(torch, spec.compute.dtype)
    if isinstance(spec.phase, RerankPhase):
        reranker = RerankerModel.from_pretrained(spec.parent, spec.settings, dtype, quantized)
        if spec.phase.loss == "yes_no":
            reranker.yes_no = PairEncoder.from_pretrained(
                spec.parent, spec.settings, spec.settings.max_text_tokens
            ).yes_no
        return _trainable(reranker, reranker, spec)
    temperature = spec.phase.temperature
    model = EmbeddingModel.from_pretrained(
        spec.parent, spec.settings, dtype, initial_temperature(spec, temperature), quantized
    )
    _check_dimensions(spec, model)
    model.log_temperature.requires_grad_(temperature.learn)
    return _trainable(
        TemperedEmbedder(model, (math.log(temperature.minimum), math.log(temperature.maximum))), model, spec
    )


def model_of(module: Module) -> EmbeddingModel | RerankerModel:
    """The model itself, without what only training adds."""
    return module.embedder if isinstance(module, TemperedEmbedder) else module


def initial_temperature(spec: PhaseSpec, temperature: Temperature) -> float:
    """The recipe's τ, or the parent checkpoint's if the recipe says 'parent'.

    Raises:
        UserError: the parent has none.
    """
    if temperature.init != "parent":
        return temperature.init
    value: float | None = read_provenance(spec.parent)["temperature"]
    if value is None:
        raise UserError(f"{spec.parent}/{PROVENANCE} has no temperature; give {spec.name} a number as temperature.init")
    return value


def save_merged(spec: PhaseSpec, state: dict[str, torch.Tensor], metrics: dict[str, float]) -> None:
    """Load what was trained into the parent and write the checkpoint; adapters are merged, and also saved separately.

    The parent is loaded in the recipe's dtype, even if training used a 4-bit copy of it.

    Args:
        state: see `engine.capture`.
        metrics: of the last step.
    """
    module = build_module(spec)
    load_trainable(module, state)
    model = model_of(module)
    if spec.phase.language_model != "full":
        output = Path(spec.output)
        save_adapter(model, spec.phase.lora, output.parent / "adapters" / output.name)
        merge_lora(model)
    record = {
        **spec.provenance,
        "phase": spec.name,
        "parent": spec.parent,
        "training": spec.phase.model_dump(mode="json"),
        "metrics": metrics,
        "temperature": model.log_temperature.exp().item() if isinstance(model, EmbeddingModel) else None,
    }
    save_checkpoint(model, spec.output, spec.settings, record)


def _trainable(module: Module, model: EmbeddingModel | RerankerModel, spec: PhaseSpec) -> Module:
    make_trainable(model, spec.phase, spec.seed)
    hold_in_fp32(model)
    if spec.compute.activation_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    module.train()
    return module


def _check_dimensions(spec: PhaseSpec, model: EmbeddingModel) -> None:
    largest = max(spec.phase.matryoshka, default=0) if isinstance(spec.phase, ContrastivePhase) else 0
    if largest > model.dimension:
        raise UserError(
            f"{spec.name}: matryoshka has {largest}; the model's embeddings have {model.dimension} dimensions"
        )
