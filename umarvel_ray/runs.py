"""The run folder: one recipe, its checkpoints by phase, its step logs, and the time each part took."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from umarvel_ray import demo
from umarvel_ray.data.dataset import Dataset
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.errors import UserError
from umarvel_ray.files import write_json, write_text
from umarvel_ray.model.checkpoint import check_files
from umarvel_ray.model.hub import model_folder
from umarvel_ray.recipe import LADDER, Recipe, dump_recipe, load_recipe
from umarvel_ray.yaml_text import read_yaml

RECIPE = "recipe.yaml"
# What may change within a run folder, since it affects no checkpoint. The folder itself and the data may also be moved:
# plans and other outputs know their data by content.
FREE = ("cluster", "embed", "evaluate", "name", "output", "data")


def base_folder(base: str) -> Path:
    """The directory that a recipe's `base` names."""
    return demo.BASE if base == demo.NAME else Path(base)


def read_run_recipe(folder: Path) -> Recipe:
    """The recipe that a run folder was created by.

    Raises:
        UserError: not a run folder.
    """
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is not a run folder (no recipe.yaml); run `make demo` first")
    return load_recipe(str(folder / RECIPE))


@dataclass(frozen=True)
class Run:
    """A recipe and the folder that holds all its outputs."""

    recipe: Recipe
    dir: Path

    @classmethod
    def open(cls, recipe: Recipe) -> Run:
        """Create or reopen the run folder.

        Raises:
            UserError: it cannot be written, or it was created by a different recipe.
        """
        folder, run = recipe.run_dir, cls(recipe, recipe.run_dir)
        text = dump_recipe(recipe)
        stored = run.recipe_path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if stored.exists() and (
                key := _first_difference(
                    _fixed(read_yaml(stored, f"{stored} is damaged"), stored),
                    _fixed(recipe.model_dump(mode="json"), stored),
                )
            ):
                raise UserError(
                    f"{folder} was created by another recipe ('{key}' differs); set output=DIR or remove the folder"
                )
            write_text(stored, text)
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror}; set output=DIR to a writable folder") from None
        return run

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other jobs out of the folder until the block ends: two would mix their outputs.

        Raises:
            UserError: another job is working in it.
        """
        with (self.dir / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another job is working in {self.dir}; wait until it has ended, or set output=DIR"
                ) from None
            except OSError:  # a file system without locks
                pass
            yield

    @property
    def recipe_path(self) -> Path:
        """The recipe that the folder was created by."""
        return self.dir / RECIPE

    @property
    def base(self) -> Path:
        """The base model's directory; one that is named by its id on the Hugging Face Hub is downloaded first.

        Raises:
            UserError: it holds no model; see `model_folder`.
        """
        path = model_folder(base_folder(self.recipe.base))
        if not (path / "config.json").is_file():
            raise UserError(
                f"base model {path} has no config.json; set base to a Hugging Face model directory or Hub id"
            )
        return path

    def open_dataset(self) -> Dataset:
        """The recipe's data; tables are converted in the run folder, which all nodes share.

        Raises: see `open_dataset`.
        """
        return open_dataset(self.recipe.data, self.dir / "tables")

    def checkpoint(self, phase: str) -> Path:
        """The directory of a phase's checkpoint; 'base' is the base model itself."""
        return self.base if phase == "base" else self.dir / "checkpoints" / phase

    def mined(self, phase: str) -> Path:
        """What mining found with the embedder of a phase."""
        return self.dir / "mined" / phase

    def has(self, phase: str) -> bool:
        """Whether a phase is finished; checkpoints appear whole or not at all."""
        return (self.checkpoint(phase) / "config.json").is_file()

    @property
    def last_phase(self) -> str | None:
        """The last finished phase of the ladder; None before the first."""
        return next((phase for phase in reversed(LADDER) if self.has(phase)), None)

    def parent(self, phase: str, what: str) -> Path:
        """The checkpoint of `phase`, from which `what` starts.

        Raises:
            UserError: it does not exist yet, or is damaged.
        """
        path = self.checkpoint(phase)
        if not self.has(phase):
            raise UserError(f"{what} starts from {path}, which does not exist; run the phase '{phase}' first")
        check_files(path)
        return path

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time of a part, in seconds, to `times.json`; interrupted attempts count too."""
        begin = time.monotonic()
        try:
            yield
        finally:
            path = self.dir / "times.json"
            times = json.loads(path.read_text()) if path.exists() else {}
            times[part] = times.get(part, 0.0) + time.monotonic() - begin
            write_json(path, times)


IN_TRAINING = "in-training.jsonl"  # beside a phase's step log: recall of its saved states


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a step log, empty if there is no log; a line truncated by a crash is ignored."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _fixed(tree: Any, where: Path) -> dict:
    if not isinstance(tree, dict):
        raise UserError(f"{where} is damaged; remove it, and give the recipe that made the run")
    with suppress(ValidationError):  # a recipe with keys that no longer exist is compared as it is
        tree = Recipe.model_validate(tree).model_dump(mode="json")  # keys added since then take their defaults
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
