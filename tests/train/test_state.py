"""A training state is restored one tensor at a time, and bit for bit, under every ZeRO stage."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray.train
import torch

from tests.support.exactness import STEP, batches, spawn, tempered
from umarvel_ray.model.batch import collate
from umarvel_ray.recipe import Compute
from umarvel_ray.train.engine import capture, load_trainable, make_engine, restore, start_step, take_step
from umarvel_ray.train.state import SavedTensors, TrainState, open_state, phase_of

STAGES = (0, 1, 2, 3)


class Watched(Mapping[str, torch.Tensor]):
    """Counts how many of the tensors that it gave out are alive when another one is looked up."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors, self._given = tensors, weakref.WeakSet()
        self.most_alive = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        self._given.add(tensor)
        self.most_alive = max(self.most_alive, len(self._given))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def save_and_restore(rank: int, world: int, base: Path, folder: Path, out: str) -> None:
    """By ZeRO stage: most tensors alive at once while a state is restored, and the names restored to other values."""
    items = [item for item in batches(base, False)[0][1] if not item.pictures]
    found = {}
    for stage in STAGES:
        compute = Compute(zero_stage=stage, dtype="float32")
        engine = make_engine(tempered(base).train(), STEP, compute)
        start_step(engine, 1e-3)
        vectors, tau = engine(collate(items), {})
        engine.backward(vectors.square().sum() * vectors[0, 0] + tau.sum())
        take_step(engine)
        saved = capture(engine)
        engine.destroy()
        (folder / str(stage)).mkdir()
        TrainState(1, saved).save("text", folder / str(stage))
        with open_state(ray.train.Checkpoint.from_directory(folder / str(stage))) as state:
            watched = Watched(state.tensors)
            module = tempered(base).train()
            load_trainable(module, watched)
            engine = make_engine(module, STEP, compute)
            restore(engine, watched, state.steps)
        restored = capture(engine)
        engine.destroy()
        wrong = [name for name, value in saved.items() if not torch.equal(restored[name], value)]
        found[stage] = (watched.most_alive, len(saved) > 20, wrong)
    torch.save(found, out)


@pytest.fixture(scope="module")
def restored(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    spawn(1, save_and_restore, tiny_base, folder, str(folder / "found.pt"))
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("stage", STAGES)
def test_one_tensor_at_a_time_and_bit_for_bit(restored, stage):
    assert restored[stage] == (1, True, [])


def test_a_checkpoint_names_its_phase_and_steps(tmp_path):
    TrainState(7, {"param.x": torch.arange(3.0)}).save("image-text", tmp_path)
    checkpoint = ray.train.Checkpoint.from_directory(tmp_path)
    assert phase_of(checkpoint) == "image-text"
    with open_state(checkpoint) as state:
        assert state.steps == 7
        assert dict(state.tensors)["param.x"].tolist() == [0, 1, 2]
        assert isinstance(state.tensors, SavedTensors)


def test_without_a_checkpoint_a_phase_starts():
    assert phase_of(None) is None
    with open_state(None) as state:
        assert (state.steps, len(state.tensors)) == (0, 0)
