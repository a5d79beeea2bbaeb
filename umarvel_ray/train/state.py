"""How far a phase has come, as a Ray Train checkpoint: written by rank 0, read by every rank one tensor at a time.

With Adam's moments the state of a fully trained model is 12 bytes per parameter, 84 GB at 7B, and a machine has eight
ranks: on resuming, none of them holds more than one of its tensors; on saving, only rank 0 holds all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import ray.train
import torch
from safetensors import safe_open
from safetensors.torch import save_file

TENSORS, POSITION = "state.safetensors", "position.txt"


@dataclass(frozen=True)
class TrainState:
    """How far a phase has come.

    Attributes:
        steps: optimizer steps taken.
        tensors: trainable parameters and Adam moments after them (see `engine.capture`); empty before the first step.
    """

    steps: int = 0
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def save(self, phase: str, folder: Path) -> None:
        """Write the state of a phase as the files of a Ray Train checkpoint."""
        save_file(dict(self.tensors), folder / TENSORS)
        (folder / POSITION).write_text(f"{phase} {self.steps}")


class SavedTensors(Mapping[str, torch.Tensor]):
    """The tensors of a safetensors file, each read when it is looked up and not kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, "pt") as file:
            self._names: list[str] = list(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def phase_of(checkpoint: ray.train.Checkpoint | None) -> str | None:
    """The phase whose state a checkpoint holds."""
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return (Path(folder) / POSITION).read_text().split()[0]


@contextmanager
def open_state(checkpoint: ray.train.Checkpoint | None) -> Iterator[TrainState]:
    """The state in a checkpoint, whose files are kept until the block ends; without one, that of a phase's start."""
    if checkpoint is None:
        yield TrainState()
        return
    with checkpoint.as_directory() as folder:
        steps = int((Path(folder) / POSITION).read_text().split()[1])
        yield TrainState(steps, SavedTensors(Path(folder) / TENSORS))
