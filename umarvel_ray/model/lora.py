"""Low-rank adapters (LoRA) on the language model's linear layers, and nowhere else (docs/method.md#lora-targets)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from umarvel_ray.errors import UserError
from umarvel_ray.model.checkpoint import HasBackbone
from umarvel_ray.recipe import Lora

if TYPE_CHECKING:  # importing PEFT takes seconds: who only embeds does without it
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

ADAPTER = "default"
TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Names from before transformers 4.52 (first two), and today's.
LAYERS = re.compile(r"^base_model\.model\.(model|language_model\.model|model\.language_model)\.layers\.")
NAME = "base_model.model.model.language_model.layers."
VARIANTS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # PEFT keys that change what r and α mean


def lora_config(lora: Lora) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias="none", target_modules=TARGETS)


def add_lora(model: HasBackbone, lora: Lora, seed: int) -> None:
    """Freeze the backbone and add adapters in place: fresh ones drawn with `seed`, or those of `lora.init`.

    `log_temperature` keeps its `requires_grad`.

    Raises:
        UserError: `lora.init` is not an adapter for these layers with this r and alpha.
    """
    from peft import inject_adapter_in_model

    model.backbone.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora_config(lora), model.backbone, adapter_name=ADAPTER)
    if lora.init:
        _load_adapter(model, lora, lora.init)
    for _, layer in _adapted(model):
        layer.cast_input_dtype_enabled = False  # autocast casts the adapter, which is smaller


def merge_lora(model: HasBackbone) -> None:
    """Merge the adapters into the weights and remove them, in place; parameters get the base's names back."""
    for name, layer in list(_adapted(model)):
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.backbone.get_submodule(parent), child, layer.get_base_layer())


def _adapted(model: HasBackbone) -> Iterator[tuple[str, LoraLayer]]:
    """The layers that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, layer) for name, layer in model.backbone.named_modules() if isinstance(layer, LoraLayer))


def save_adapter(model: HasBackbone, lora: Lora, path: str | Path) -> None:
    """Write the adapters as a directory that `peft.PeftModel.from_pretrained(backbone, path)` reads."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in _adapter(model).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    lora_config(lora).save_pretrained(str(path))


def _adapter(model: HasBackbone) -> dict[str, torch.Tensor]:
    """The adapters' tensors under the names that PEFT uses in its files."""
    return {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value.detach()
        for name, value in model.backbone.state_dict().items()
        if ".lora_" in name
    }


def _load_adapter(model: HasBackbone, lora: Lora, init: str) -> None:
    """Load a saved adapter; layers it leaves out keep their fresh one, which changes nothing until it is trained."""
    path, own = Path(init), _adapter(model)
    try:
        config, saved = json.loads((path / CONFIG).read_text()), load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"lora.init {path}: not a readable PEFT adapter ({error}); give its directory") from None
    if variant := next((key for key in VARIANTS if config.get(key)), None):
        raise UserError(
            f"lora.init {path}: made with {variant}, which is not supported; merge it into the base model instead"
        )
    r, alpha = config.get("r"), config.get("lora_alpha")
    if r is None or alpha is None:
        kind = config.get("peft_type", "unknown")
        raise UserError(f"lora.init {path}: a PEFT adapter of type {kind}; use one of type LORA")
    if (r, alpha) != (lora.r, lora.alpha):
        raise UserError(f"lora.init {path}: made with r: {r}, alpha: {alpha}; set lora.r and lora.alpha to these")
    for saved_name, value in saved.items():
        name = LAYERS.sub(NAME, saved_name)
        if name not in own or own[name].shape != value.shape:
            raise UserError(
                f"lora.init {path}: '{saved_name}' fits no layer of this model; use an adapter of the same base"
            )
        own[name].copy_(value)
