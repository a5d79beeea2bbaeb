"""int8 weights are within half a step of the original ones, and products as close as that allows."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from umarvel_ray.model import int8
from umarvel_ray.model.int8 import Int8Linear, rotate

needs_vnni = pytest.mark.skipif(not int8.multiplies_int8(), reason="this CPU has no VNNI")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-12, 3), zero_row=st.booleans())
def test_every_weight_is_within_half_a_step(dtype, rotated, seed, exponent, zero_row):
    linear = nn.Linear(64, 16, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(16, 64, generator=generator) * 10.0**exponent)
        if zero_row:
            linear.weight[3] = 0
    linear = linear.to(dtype)
    quantized = Int8Linear(linear, rotated)
    assert quantized.levels.min() >= -127
    assert quantized.scale.dtype == dtype
    scale = quantized.scale.double()[:, None]
    weight = linear.weight.detach().float()
    errors = (quantized.levels * scale - (rotate(weight) if rotated else weight).double()).abs() / scale
    # A quotient of up to 127 is itself rounded, in float32.
    assert errors.max() <= 0.5 + 127 * 2.0**-23


def hadamard(size: int) -> np.ndarray:
    """Entry (i, j) is −1 if i and j have an odd number of ones in common, in binary, else 1."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_a_rotation_is_hadamards(size):
    states = torch.randn(3, 5 * size if size < 64 else 192)
    expected = np.concatenate(
        [part @ hadamard(size) / size**0.5 for part in np.split(states.numpy(), states.shape[1] // size, 1)], 1
    )
    np.testing.assert_allclose(rotate(states).numpy(), expected, atol=1e-5)


@needs_vnni
@given(
    seed=st.integers(0, 2**32),
    tokens=st.integers(1, 70),
    exponents=st.tuples(st.integers(-20, 20), st.integers(-8, 4)),
    bias=st.booleans(),
)
def test_products_are_as_close_as_half_a_level_allows_and_independent_of_other_tokens(seed, tokens, exponents, bias):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(96, 40, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(40, 96, generator=generator) * 10.0 ** exponents[1])
    layer = Int8Linear(linear, rotated=True)
    states = torch.randn(tokens, 96, generator=generator) * 10.0 ** exponents[0]
    states[0, 3] *= 100  # an outlier costs its own token's precision only
    found = (layer(states) - (linear.bias if bias else 0)).detach().double()
    x, w = rotate(states).double(), rotate(linear.weight.detach()).double()
    x_step, w_step = x.abs().amax(1, keepdim=True) / 127, w.abs().amax(1) / 127
    bound = x.abs().sum(1, keepdim=True) * w_step / 2 + x_step / 2 * (w.abs() + w_step[:, None] / 2).sum(1)
    rounding = 1e-5 * (x.abs() @ w.abs().T) + (1e-6 if bias else 0)
    assert ((found - states.double() @ linear.weight.detach().double().T).abs() <= bound + rounding).all()
    alone = torch.cat([layer(state[None]) for state in states])
    one_level = (x_step * w.abs().amax(1)).float()
    assert ((layer(states) - alone).abs() <= 2 * one_level + rounding.float()).all()
    torch.testing.assert_close(layer(states[None, :, None])[0, :, 0], layer(states))


@needs_vnni
def test_channels_that_are_always_large_leave_levels_for_the_others():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(256, 256, generator=generator))
    states = torch.randn(64, 256, generator=generator)
    states[:, 7] += 300
    expected = (states @ linear.weight.T).detach()
    error = (Int8Linear(linear, rotated=True)(states) - expected).norm() / (expected - expected.mean(0)).norm()
    scale = states.abs().amax(1, keepdim=True) / 127
    unrotated = ((states / scale).round() * scale @ linear.weight.T - expected).norm() / (
        expected - expected.mean(0)
    ).norm()
    assert error < unrotated / 4


def test_elsewhere_only_weights_are_rounded(monkeypatch):
    monkeypatch.setattr(int8, "multiplies_int8", lambda: False)
    model = nn.Sequential(nn.Linear(40, 24))
    int8.quantize(model)
    states, [layer] = torch.randn(5, 40), model
    stored = layer.levels * layer.scale[:, None]
    torch.testing.assert_close(layer(states), states @ stored.T + layer.bias)


def test_int8_products_are_for_cpus_only():
    for device in ("cuda", "mps"):
        model = nn.Sequential(nn.Linear(64, 16))
        int8.quantize(model, device)
        assert not model[0].rotated


def test_a_rotated_layer_still_runs_after_it_was_moved():
    layer = Int8Linear(nn.Linear(64, 16), rotated=True).to("meta")
    assert layer(torch.empty(2, 3, 64, device="meta")).shape == (2, 3, 16)


def test_pytorchs_own_loop_is_not_used():
    int8.multiplies_int8.cache_clear()
    try:
        with torch.backends.mkldnn.flags(enabled=False):
            assert not int8.multiplies_int8()
    finally:
        int8.multiplies_int8.cache_clear()


@needs_vnni
@pytest.mark.parametrize(
    ("tokens", "channels", "dtype"), [(0, 64, torch.float32), (3, 37, torch.float32), (3, 64, torch.bfloat16)]
)
def test_no_tokens_odd_channels_and_half_precision(tokens, channels, dtype):
    linear = nn.Linear(channels, 16).to(dtype)
    layer, states = copy.deepcopy(Int8Linear(linear, rotated=True)), torch.randn(tokens, channels).to(dtype)
    found, expected = layer(states), linear(states)
    assert (found.dtype, found.shape) == (dtype, (tokens, 16))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_what_is_kept_of_a_rotation_works_in_every_mode():
    int8._hadamard.cache_clear()
    with torch.inference_mode():
        rotate(torch.ones(1, 64))
    states = torch.ones(1, 64, requires_grad=True)
    rotate(states).sum().backward()
    assert states.grad is not None


def test_states_that_are_not_finite_stay_so():
    for rotated in (False, int8.multiplies_int8()):
        layer = Int8Linear(nn.Linear(64, 16), rotated)
        states = torch.ones(3, 64)
        states[1, 5], states[2, 0] = torch.nan, torch.inf
        assert layer(states).isfinite().all(1).tolist() == [True, False, False]
