"""Named presets: how published systems' own code embeds or scores, as data, one file each (docs/guide.md#presets).

A file gives the `kind` of its model, the `settings`, and under `models` the model types that it fits, each with the
settings that differ there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from umarvel_ray.errors import UserError
from umarvel_ray.recipe import ModelSettings, merge
from umarvel_ray.section import Section
from umarvel_ray.yaml_text import read_yaml

FOLDER = Path(__file__).parent
Kind = Literal["embedder", "reranker"]


class Preset(Section):
    """A preset's file."""

    kind: Kind
    settings: dict[str, Any]
    models: dict[str, dict[str, Any] | None]

    def of(self, model_type: str) -> ModelSettings:
        """The settings for a model type that it fits."""
        return ModelSettings.model_validate(merge(self.settings, self.models[model_type] or {}))


def presets(kind: Kind) -> dict[str, Preset]:
    """All presets of a kind by name."""
    found = {file.stem: read_preset(file.stem) for file in sorted(FOLDER.glob("*.yaml"))}
    return {name: preset for name, preset in found.items() if preset.kind == kind}


def read_preset(name: str) -> Preset:
    """The preset of this name, which must exist."""
    return Preset.model_validate(read_yaml(FOLDER / f"{name}.yaml", f"preset {name}"))


def preset_settings(name: str, kind: Kind, folder: str | Path) -> ModelSettings:
    """The settings of a preset for the model in a directory.

    Raises:
        UserError: no such preset; it is of the other kind, or does not fit the model's type; no `config.json`.
    """
    known = presets(kind)
    if name not in known:
        article = {"embedder": "an embedder", "reranker": "a reranker"}
        other = "reranker" if kind == "embedder" else "embedder"
        reason = f"preset '{name}' is for {article[other]}" if name in presets(other) else f"unknown preset '{name}'"
        raise UserError(f"{reason}; those for {article[kind]} are {', '.join(known)}")
    file = Path(folder) / "config.json"
    try:
        model_type = json.loads(file.read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file}: no model_type to be read; give the directory of a Hugging Face model") from None
    if model_type not in known[name].models:
        fitting = ", ".join(known[name].models)
        raise UserError(f"{file}: preset '{name}' is for model_type {fitting}, not '{model_type}'")
    return known[name].of(model_type)
