"""int8 weights are within half a step of the original ones, whatever the dtype and the size of the weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from umarvel_ray.model.int8 import Int8Linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-12, 3), zero_row=st.booleans())
def test_every_weight_is_within_half_a_step(dtype, seed, exponent, zero_row):
    linear = nn.Linear(64, 16, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(16, 64, generator=generator) * 10.0**exponent)
        if zero_row:
            linear.weight[3] = 0
    linear = linear.to(dtype)
    quantized = Int8Linear(linear)
    assert quantized.levels.min() >= -127
    assert quantized.scale.dtype == dtype
    scale = quantized.scale.double()[:, None]
    errors = (quantized.levels * scale - linear.weight.double()).abs() / scale
    assert errors.max() <= 0.5 + 1e-6
