"""Low-rank adapters on the language model's linear layers, and nowhere else (method section 2; trap T8)."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from umarvel_ray.model.embedding_model import EmbeddingModel
from umarvel_ray.recipe import Lora

ADAPTER = "default"
TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def lora_config(lora: Lora) -> LoraConfig:
    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none", target_modules=TARGETS)


def add_lora(model: EmbeddingModel, lora: Lora, seed: int) -> None:
    """Freeze the backbone and put fresh adapters into it, in place. Same seed, same adapters.

    `log_temperature` keeps its own `requires_grad`.
    """
    model.backbone.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(lora), model.backbone, adapter_name=ADAPTER)
    for layer in model.backbone.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False  # autocast casts the adapter, which is smaller


def merge_lora(model: EmbeddingModel) -> None:
    """Add the adapters to the weights and take them out, in place: the names are the base's again."""
    for name, layer in list(model.backbone.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.backbone.get_submodule(parent), child, layer.get_base_layer())


def save_adapter(model: EmbeddingModel, lora: Lora, path: str | Path) -> None:
    """Write the adapters as a directory that `peft.PeftModel.from_pretrained(backbone, path)` reads."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value.detach().cpu().contiguous()
        for name, value in model.backbone.state_dict().items()
        if ".lora_" in name
    }
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    lora_config(lora).save_pretrained(path)
