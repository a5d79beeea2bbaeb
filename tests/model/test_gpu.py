"""Models on a real GPU give the CPU's values; for machines without one see `test_device_discipline.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.device_scenarios import FAMILIES, MODELS, run_scenarios

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_scenarios(MODELS, tmp_path_factory.mktemp("device"), "cuda")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_the_cpus_values(results, family, name):
    expected, found = results[family, name]
    assert isinstance(found, np.ndarray), found
    assert found == pytest.approx(expected, abs=2e-3)
