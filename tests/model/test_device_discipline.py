"""Models on a GPU, without one: on a second device that refuses the CPU's tensors, they give the CPU's values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.device_scenarios import FAMILIES, MODELS, run_scenarios
from tests.support.exactness import spawn


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_scenarios(MODELS, tmp_path_factory.mktemp("device"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_meets_tensors_of_its_own_device_only(results, family, name):
    expected, found = results[family, name]
    assert isinstance(found, np.ndarray), found
    assert found == pytest.approx(expected, abs=1e-5)


def refusals(rank: int, world: int, out: str) -> None:
    """Which operations on tensors of both devices the second one refuses."""
    from tests.support.second_device import SECOND, second_device

    with second_device():
        here, there = torch.ones(3), torch.ones(3).to(SECOND)
        operations = {
            "sum": lambda: here + there,
            "cat": lambda: torch.cat([here, there]),
            "index on the wrong side": lambda: here[there.long()],
            "values on the wrong side": lambda: there.masked_scatter(there > 0, here),
            "one number": lambda: there * torch.tensor(2.0),
            "index": lambda: there[torch.tensor([0, 2])],
            "copy": lambda: there.copy_(here),
            "move": lambda: here.to(there),
        }
        refused = []
        for name, operation in operations.items():
            try:
                operation()
            except RuntimeError as error:
                refused.append((name, str(error).split(": ")[1][:30]))
        torch.save(refused, out)


def test_the_second_device_refuses_what_a_gpu_refuses(tmp_path):
    spawn(1, refusals, str(tmp_path / "refused.pt"))
    refused = ("sum", "cat", "index on the wrong side", "values on the wrong side")
    assert torch.load(tmp_path / "refused.pt") == [(name, "expected all tensors on one de") for name in refused]
