"""Training on a GPU, without one: on a second device that refuses the CPU's tensors, steps give the CPU's values."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.device_scenarios import FAMILIES, TRAINING, run_scenarios


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_scenarios(TRAINING, tmp_path_factory.mktemp("device"))


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_meets_tensors_of_its_own_device_only(results, family, name):
    expected, found = results[family, name]
    assert isinstance(found, np.ndarray), found
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(set(found[:, 0])) == len(found)  # every step trained
