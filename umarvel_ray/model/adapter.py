"""Models published as a PEFT adapter of another model: a folder of links that loads like a whole model.

The folder holds links to the base model's files and to the adapter's, whose tokenizer and image processor win. Its
weights are merged when they are loaded (`merge_adapter`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_folder, user_cache
from umarvel_ray.model.checkpoint import check_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The names in the folder of links: under PEFT's own, transformers would look for the base by itself.
LINKED = {CONFIG: "adapter.json", WEIGHTS: "adapter.safetensors"}
READ = ("*.json", "*.jinja", "*.txt", "*.safetensors")
OF_BASE = re.compile(r"config\.json|generation_config\.json|.*\.index\.json|.*\.safetensors|umarvel\.json")
# What layers were called before transformers 4.52, and what they are called today.
NAMES = {
    re.compile(
        r"^base_model\.model\.(model|language_model\.model|model\.language_model)\.layers\."
    ): "model.language_model.layers.",
    re.compile(r"^base_model\.model\.(model\.)?visual\."): "model.visual.",
}
VARIANTS = ("rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")  # PEFT's; none is merged here


def is_adapter(folder: Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    whole = any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))
    return (folder / CONFIG).is_file() and not whole


def base_name(folder: Path) -> str:
    """The base model that an adapter names: a path or an id.

    Raises:
        UserError: it names none.
    """
    name = _config(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder / CONFIG}: no 'base_model_name_or_path'; give the base model's directory")
    return name


def base_beside(folder: Path, name: str) -> Path | None:
    """The directory of an adapter's base: as it is named, seen from the adapter, or beside it under its last name."""
    tried = (Path(name), folder / name, folder.absolute().parent / Path(name).name)
    return next((path for path in tried if path.is_dir()), None)


def linked_folder(adapter: Path, base: Path) -> Path:
    """A directory with links to the files of both, in the user's cache.

    Raises:
        UserError: a file of the base or of the adapter is missing, or the cache cannot be written.
    """
    check_files(base)
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter / WEIGHTS}: missing; copy the adapter again, or save it as safetensors")
    own = {path.name: path for path in _files(adapter) if not OF_BASE.fullmatch(path.name) and path.name not in LINKED}
    links = {path.name: path for path in _files(base)} | own
    links |= {LINKED[name]: (adapter / name).absolute() for name in LINKED}
    name = hashlib.sha256(f"{adapter.absolute()}\0{base.absolute()}".encode()).hexdigest()[:16]
    folder = user_cache() / "adapters" / f"{adapter.absolute().name}-{name}"
    if folder.is_dir() and {path.name: path.readlink() for path in folder.iterdir()} == links:
        return folder
    try:
        with atomic_folder(folder) as fresh:
            for name, path in links.items():
                os.symlink(path, fresh / name)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def merge_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Merge the adapter of a folder of links, if there is one, into the weights, in place.

    LoRA, rsLoRA and DoRA, on any linear layers.

    Raises:
        UserError: another kind of adapter, or one that does not fit this model.
    """
    config, weights = (folder / LINKED[name] for name in (CONFIG, WEIGHTS))
    if not config.is_file():
        return
    # Imported here: most models have no adapter, and whoever only names a model needs no PyTorch.
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file

    given = _config(config)
    where = config.resolve().parent
    if given.get("peft_type") != "LORA":
        raise UserError(f"{where}: a PEFT adapter of type {given.get('peft_type')}; use one of type LORA")
    if variant := next((key for key in VARIANTS if given.get(key)), None):
        raise UserError(f"{where}: made with {variant}, which is not supported; merge it into the base model instead")
    try:
        saved = {_name(name): value for name, value in load_file(weights).items()}
    except SafetensorError as error:
        raise UserError(f"{where / WEIGHTS}: not readable ({error}); copy the adapter again") from None
    layers = sorted({name.partition(".lora_")[0] for name in saved})
    known = {name for name, _ in model.named_modules()}
    if strange := next((name for name in layers if name not in known), None):
        raise UserError(f"{where}: '{strange}' is no layer of this model; use the adapter's own base")
    keys = ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out")
    lora = LoraConfig(target_modules=layers, **{key: given[key] for key in keys if given.get(key) is not None})
    inject_adapter_in_model(lora, model)
    try:
        report: Any = set_peft_model_state_dict(
            model, {f"base_model.model.{name}": value for name, value in saved.items()}
        )
    except RuntimeError as error:  # other shapes
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: does not fit this model ({reason}); use the adapter's own base") from None
    missing = [name for name in report.missing_keys if ".lora_" in name]
    if missing or report.unexpected_keys:
        raise UserError(f"{where}: '{[*missing, *report.unexpected_keys][0]}' is missing or unknown; copy it again")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.requires_grad_(True)  # injecting froze it


def _files(folder: Path) -> list[Path]:
    return sorted(path.absolute() for pattern in READ for path in folder.glob(pattern))


def _config(file: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        return config
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({error}); copy the adapter again") from None


def _name(saved: str) -> str:
    """A parameter's name in today's model."""
    for pattern, today in NAMES.items():
        saved = pattern.sub(today, saved)
    return saved.removeprefix("base_model.model.")
