"""Which parameters of a backbone a phase trains, and which part of the model a parameter belongs to."""

from __future__ import annotations

from typing import Any

from umarvel_ray.model.checkpoint import HasBackbone
from umarvel_ray.model.lora import add_lora
from umarvel_ray.recipe import Phase

PARTS = ("language_model", "projector", "vision", "temperature")
VISION: dict[str, tuple[str, ...]] = {"frozen": (), "projector": ("projector",), "full": ("projector", "vision")}


def part_of(name: str) -> str:
    """The part, one of `PARTS`, that a parameter belongs to by its name.

    "vision" is the tower without its projector; Qwen3-VL's DeepStack mergers belong to the projector.
    """
    if ".visual." in name:
        return "projector" if "merger" in name else "vision"
    return "temperature" if name.endswith("log_temperature") else "language_model"


def make_trainable(model: HasBackbone, phase: Phase, seed: int) -> None:
    """Set `requires_grad` on what the phase trains and nothing else, in place; adds adapters if it trains those.

    The token tables (embeddings and lm_head, one tensor in some models) are never trained: a batch touches few of their
    rows, and their optimizer state is large. `log_temperature` keeps its `requires_grad`.

    Raises:
        UserError: see `add_lora`.
    """
    backbone: Any = model.backbone
    if phase.language_model == "full":
        backbone.requires_grad_(False)
        backbone.model.language_model.requires_grad_(True)
        backbone.get_input_embeddings().requires_grad_(False)
    else:
        add_lora(model, phase.lora, seed)
    for name, parameter in backbone.named_parameters():
        if part_of(name) in VISION[phase.vision]:
            parameter.requires_grad_(True)
