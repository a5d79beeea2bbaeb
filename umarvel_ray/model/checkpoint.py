"""Checkpoints: a Hugging Face directory plus `umarvel.json`, which states how to use it and where it comes from."""

from __future__ import annotations

import hashlib
import json
import platform
import struct
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ValidationError

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_folder
from umarvel_ray.model.companions import write_companions
from umarvel_ray.recipe import ModelSettings
from umarvel_ray.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVENANCE = "umarvel.json"
# Configurations, tokenizer and chat template, however their files are called, and files that change nothing.
READ = ("*.json", "*.jinja", "merges.txt")
NOT_READ = (PROVENANCE, "modules.json", "config_sentence_transformers.json", "generation_config.json")


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint: its absolute path, its settings, and a digest of all that its vectors depend on.

    Checkpoints of equal `identity` give equal embeddings, or equal scores if they are rerankers.
    """

    path: str
    settings: ModelSettings
    identity: str

    @classmethod
    def of(cls, checkpoint: str | Path, settings: ModelSettings | None = None) -> CheckpointRef:
        """Reference the checkpoint in a directory.

        Args:
            settings: override the checkpoint's own; required for a base model, which has none.

        Raises:
            UserError: missing or truncated files, or a base model without `settings`.
        """
        path = Path(checkpoint).absolute()
        check_files(path)
        settings = settings or load_settings(path)
        digest = hashlib.sha256(settings.model_dump_json(exclude_none=True).encode())
        for file in sorted(path.glob("*.safetensors")):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        for file in sorted(file for pattern in READ for file in path.glob(pattern) if file.name not in NOT_READ):
            digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return cls(str(path), settings, digest.hexdigest())


class HasBackbone(Protocol):
    """An embedder or a reranker."""

    backbone: PreTrainedModel


def save_checkpoint(model: HasBackbone, path: str | Path, settings: ModelSettings, provenance: dict[str, Any]) -> None:
    """Write weights, config, tokenizer, image processor, chat template, `umarvel.json` and a model card, atomically.

    An embedder's directory opens in sentence-transformers, too. Tokenizer and image processor come from the directory
    that the backbone was loaded from. An existing checkpoint at `path` is replaced only once the new one is complete.

    Args:
        model: an embedder or a reranker with merged adapters.
        provenance: temperature, phase, parent, recipe, data and metrics; versions are added here.

    Raises:
        UserError: the disk is full or `path` cannot be written.
        ValueError: the adapters are not merged.
    """
    backbone = model.backbone
    if any(".lora_" in name for name in backbone.state_dict()):
        raise ValueError("merge the adapters before saving: merge_lora(model)")
    try:
        with atomic_folder(path) as fresh:
            backbone.save_pretrained(fresh)
            _save_processor(str(backbone.name_or_path), fresh, settings)
            record = {"settings": settings.model_dump(mode="json"), **provenance, "versions": _versions()}
            (fresh / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n")
            write_companions(fresh, record)
    except OSError as error:
        raise UserError(f"{path}: checkpoint cannot be written ({error.strerror or error})") from None


def read_provenance(path: str | Path) -> dict[str, Any]:
    """The contents of `umarvel.json`.

    Raises:
        UserError: no such checkpoint, or the file is not valid JSON.
    """
    file = Path(path) / PROVENANCE
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        return record
    except FileNotFoundError:
        raise UserError(f"{file}: not found; use a checkpoint written by umarvel-ray, or name its preset") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); write the checkpoint again") from None


def load_settings(path: str | Path) -> ModelSettings:
    """The settings a checkpoint was trained with.

    Raises:
        UserError: see `read_provenance`; or the settings are missing or invalid.
    """
    try:
        return ModelSettings.model_validate(read_provenance(path)["settings"])
    except (KeyError, TypeError, ValidationError):
        raise UserError(f"{Path(path) / PROVENANCE}: no valid 'settings'; write the checkpoint again") from None


def check_files(path: str | Path) -> None:
    """Check that config and weights exist and, by each safetensors file's header, are complete.

    Raises:
        UserError: names the first file that is missing or truncated.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json; give the directory of a Hugging Face model")
    index = path / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    except (KeyError, ValueError):
        raise UserError(f"{index}: not a valid index; copy the checkpoint again") from None
    for file in (path / name for name in sorted(names)):
        if not file.is_file():
            raise UserError(f"{file}: missing; copy the checkpoint again")
        if not _is_whole(file):
            raise UserError(f"{file}: truncated or damaged; copy the checkpoint again")


def _is_whole(file: Path) -> bool:
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < 2**30 else {}
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (struct.error, ValueError, TypeError, KeyError):
            return False
    return bool(ends) and file.stat().st_size == 8 + length + max(ends)


def _save_processor(source: str, target: Path, settings: ModelSettings) -> None:
    # Imported here so that reading a checkpoint's records does not import transformers.
    from umarvel_ray.items.pictures import CONFIG, read_picture_config
    from umarvel_ray.items.template import load_tokenizer

    load_tokenizer(source).save_pretrained(target)
    size = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    changes = {} if settings.resize_twice else {"size": size}
    (target / CONFIG).write_text(json.dumps(read_picture_config(source) | changes, indent=2) + "\n")


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "ray")}
    return {"umarvel_ray": __version__, "python": platform.python_version(), **packages}
