"""The run folder: one recipe, its checkpoints by step name, and how long each part took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from umarvel_ray.errors import UserError
from umarvel_ray.model.checkpoint import check_files
from umarvel_ray.recipe import Recipe, dump_recipe

STAGE1 = ("text", "image-text", "instruction")
STAGE2, STAGE3 = "hard-negatives", "distillation"
LADDER = (*STAGE1, STAGE2, STAGE3)  # the embedder's checkpoints, in order
BUILTIN = Path(__file__).parent / "demo"
FREE = ("cluster", "embed", "evaluate")  # sections that may change within a run folder: they change no checkpoint


def base_folder(base: str) -> Path:
    """The directory that a recipe's `base` names."""
    return BUILTIN / "base" if base == "builtin:demo" else Path(base)


@dataclass(frozen=True)
class Run:
    """A recipe and the folder that everything it makes goes into."""

    recipe: Recipe
    dir: Path

    @classmethod
    def open(cls, recipe: Recipe) -> Run:
        """Create or re-open the run folder.

        Raises:
            UserError: it cannot be written, or it was made by a different recipe.
        """
        folder = recipe.run_dir
        text = dump_recipe(recipe)
        stored = folder / "recipe.yaml"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if stored.exists() and (key := _first_difference(_fixed(stored.read_text()), _fixed(text))):
                raise UserError(
                    f"{folder} was made by another recipe ('{key}' differs); set output=DIR or remove the folder"
                )
            stored.write_text(text)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; set output=DIR to a writable folder") from None
        return cls(recipe, folder)

    @property
    def base(self) -> Path:
        """The base model's directory."""
        path = base_folder(self.recipe.base)
        if not (path / "config.json").is_file():
            raise UserError(f"base model {path} has no config.json; set base=DIR to a Hugging Face model directory")
        return path

    def checkpoint(self, step: str) -> Path:
        """Where the checkpoint of a ladder step stands ('base' is the base model itself)."""
        return self.base if step == "base" else self.dir / "checkpoints" / step

    def has(self, step: str) -> bool:
        """Whether a ladder step is finished (checkpoints appear whole or not at all)."""
        return (self.checkpoint(step) / "config.json").is_file()

    def parent(self, step: str, stage: str) -> Path:
        """The checkpoint that `stage` starts from; a UserError when it is not there yet."""
        path = self.checkpoint(step)
        if not self.has(step):
            raise UserError(
                f"{stage} starts from {path}, which does not exist; run the stage that makes '{step}' first"
            )
        check_files(path)
        return path

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall seconds of a part to `times.json`, over interruptions too."""
        begin = time.monotonic()
        try:
            yield
        finally:
            path = self.dir / "times.json"
            times = json.loads(path.read_text()) if path.exists() else {}
            times[part] = times.get(part, 0.0) + time.monotonic() - begin
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(times, indent=1))
            partial.replace(path)


def _fixed(text: str) -> dict:
    tree = yaml.safe_load(text) or {}
    with suppress(ValidationError):  # a recipe with keys that are no longer known is compared as it is
        tree = Recipe.model_validate(tree).model_dump(mode="json")  # keys that came later take their defaults
    return {key: value for key, value in tree.items() if key not in FREE}


def _first_difference(old: dict, new: dict, prefix: str = "") -> str | None:
    for key in {**new, **old}:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            if found := _first_difference(a, b, f"{prefix}{key}."):
                return found
        elif a != b:
            return f"{prefix}{key}"
    return None
