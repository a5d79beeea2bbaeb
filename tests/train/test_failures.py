"""Failed steps: detected, reported in one line that names the step and the keys, logged with the step's items."""

from __future__ import annotations

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from umarvel_ray.data.plan import PlanStep, read_plan, write_plan
from umarvel_ray.data.stored import StoredTable, write_stored
from umarvel_ray.recipe import Compute, ContrastivePhase, ModelSettings
from umarvel_ray.runs import read_step_log
from umarvel_ray.train.failures import (
    NOT_FINITE,
    StepError,
    check_finite,
    describe,
    explain_out_of_memory,
    record_failure,
)
from umarvel_ray.train.phases import PhaseSpec
from umarvel_ray.train.stream import PhaseTables

ALLOCATORS = [
    MemoryError("Unable to allocate 12.0 GiB for an array"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: 12 bytes"),
]


@pytest.fixture
def spec(tmp_path):
    folder = tmp_path / "train" / "text"
    arrays = {"targets": np.zeros(2, np.int32), "relevant": np.zeros((0, 2), np.int32)}
    plan = [PlanStep(n, np.array([2 * n + 1, 2 * n]), np.array([n]), arrays) for n in range(3)]
    write_plan(plan, folder / "plan.parquet")
    return PhaseSpec(
        name="text",
        phase=ContrastivePhase(queries="x", batch_size=2, learning_rate=1e-3),
        parent="parent",
        output=str(tmp_path / "text"),
        folder=str(folder),
        settings=ModelSettings(),
        compute=Compute(token_budget=100),
        seed=0,
        provenance={},
    )


@pytest.fixture
def tables(tmp_path) -> PhaseTables:
    """Queries q0 … q9 and documents d0 … d4."""

    def store(letter: str, count: int) -> StoredTable:
        batch = pa.record_batch({"id": [f"{letter}{n}" for n in range(count)]})
        return write_stored(tmp_path / f"{letter}.arrow", batch.schema, [batch])

    return PhaseTables(store("q", 10), store("d", 5), "parent", ModelSettings())


def test_a_non_finite_number_names_step_and_items(tables):
    plan = PlanStep(7, np.array([4, 0, 9, 1]), np.array([2]), {})
    check_finite("text", plan, tables, 1.0, 2.0)
    for loss, norm, message in ((float("nan"), 1.0, "loss is nan"), (1.0, float("inf"), "gradient norm is inf")):
        with pytest.raises(
            StepError, match=f"^text: {message} at step 7 \\(queries q4, q0, q9, …\\); lower learning_rate"
        ):
            check_finite("text", plan, tables, loss, norm)


# Under a budget of 100, padded: 60, then 40 + 40, then 30 and 20; the fullest holds 80 tokens. Packed: 60 + 40 first.
@pytest.mark.parametrize(("packed", "fullest"), [(False, "80 padded"), (True, "100 packed")])
@pytest.mark.parametrize("error", ALLOCATORS, ids=lambda error: type(error).__name__)
def test_a_rank_out_of_memory_names_what_to_lower(error, packed, fullest, spec):
    with pytest.raises(StepError) as raised, explain_out_of_memory(spec, 2, 1, [30, 40, 60, 20, 40], packed):
        raise error
    message = str(raised.value)
    assert message.startswith(
        f"text: rank 1 is out of memory at step 2, with up to {fullest} tokens in a chunk and 60 in an item; lower"
    )
    assert "compute.token_budget (100)" in message
    assert "model.max_pixels" in message
    assert "\n" not in message


def test_the_loop_stops_before_it_logs_a_non_finite_number(spec, tables, monkeypatch):
    """The loop itself, with a fake model, engine and stream; test_resume runs the real ones in `make test-all`."""
    from umarvel_ray.train import loop

    batches = [SimpleNamespace(plan=step, lengths=[1]) for step in read_plan(spec.plan_path)]
    results = iter([(0.5, 0.05, 9), (float("nan"), 0.05, 9)])
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3}])
    engine = SimpleNamespace(train=lambda: None, optimizer=optimizer, device="cpu", module=None)
    fakes = {
        "dist": SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1),
        "start_phase": lambda *_: (engine, None),
        "open_stream": lambda *_: iter(batches),
        "run_step": lambda *_: next(results),
        "take_step": lambda _: 1.0,
        "start_step": lambda *_: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(loop, name, fake)
    with pytest.raises(StepError, match=r"text: loss is nan at step 1 \(queries q3, q2, …"):
        loop._train_phase(spec, tables, 1, 1.0, None, False)
    assert [row["step"] for row in read_step_log(spec.log_path)] == [0]


def test_other_errors_pass_unchanged(spec):
    with pytest.raises(RuntimeError, match="shapes differ"), explain_out_of_memory(spec, 0, 0, [1], False):
        raise RuntimeError("shapes differ")


def test_a_step_error_takes_precedence_over_lost_connections():
    lost = Exception("Traceback (most recent call last):\n  ...\nRuntimeError: Connection closed by peer [127.0.0.1]\n")
    error = StepError("text: loss is nan", NOT_FINITE)
    own = UserExceptionWithTraceback(error, "Traceback …")  # as Ray Train passes it
    assert describe({0: lost, 1: pickle.loads(pickle.dumps(error))}) == "text: loss is nan"
    assert describe({0: lost, 1: own}) == "text: loss is nan"
    assert describe({0: lost, 2: Exception("The actor died: SIGKILL")}) == "rank 2: The actor died: SIGKILL"
    assert describe({3: lost}) == "rank 3: RuntimeError: Connection closed by peer [127.0.0.1]"
    assert describe({2: Exception()}) == "rank 2: Exception()"


@pytest.mark.parametrize(("logged", "step"), [([], 0), ([0], 1), ([0, 1], 2)])
def test_failures_are_logged_with_the_current_step_and_its_items(logged, step, spec, tables):
    spec.log_path.write_text("".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in logged))
    record_failure([spec], {"text": tables}, {1: RuntimeError("killed")})
    record_failure([spec], {"text": tables}, {0: RuntimeError("again"), 1: RuntimeError("other")})
    first, second = read_step_log(spec.failures_path)
    items = {"query_ids": [f"q{2 * step + 1}", f"q{2 * step}"], "document_ids": [f"d{step}"]}
    assert first == {"kind": "other", "step": step, "ranks": [1], "error": "rank 1: killed"} | items
    assert second["ranks"] == [0, 1]


def test_a_failure_after_the_last_step_names_no_items(spec, tables):
    spec.log_path.write_text("".join(json.dumps({"step": n}) + "\n" for n in range(3)))
    record_failure([spec], {"text": tables}, {0: OSError("disk")})
    assert read_step_log(spec.failures_path)[0]["query_ids"] == []
