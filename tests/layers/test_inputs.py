"""The rounding of inputs, against the library that simulates it when a folder is loaded."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.layers.inputs import DATA_TYPES, InputGrid
from optimum_order.testing import DTYPES, gaussian, same_bits

KINDS = {"int8": "int", "fp8": "float"}


def simulated(x, grid):
    """What compressed-tensors makes of an input."""
    kind = KINDS[grid.data_type]
    if grid.scale is None:
        args = QuantizationArgs(type=kind, num_bits=8, strategy="token", dynamic=True)
        scale, zero = compute_dynamic_scales_and_zp(x, args, module=None)
    else:
        args = QuantizationArgs(type=kind, num_bits=8, strategy="tensor")
        scale, zero = grid.scale, None
    return fake_quantize(x, scale, zero, args)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(5, 8), (2, 3, 8), (1, 1, 1), (2, 3, 4, 8)]),
    size=st.sampled_from([1e-30, 1e-6, 0.02, 1.0, 3e4]),
    data_type=st.sampled_from(DATA_TYPES),
    dtype=st.sampled_from(DTYPES),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_inputs_are_rounded_as_the_library_rounds_them(shape, size, data_type, dtype, static, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * size).clamp(-6e4, 6e4).to(dtype)
    x[..., ::3] = 0.0
    x[0] = 0.0  # tokens of zeros
    largest = torch.tensor(size if static else 1.0)
    grid = InputGrid.fit(largest, data_type, dtype) if static else InputGrid(data_type)
    rounded = grid.nearest(x)
    assert torch.isfinite(rounded).all() and rounded.dtype == dtype
    assert torch.equal(rounded, simulated(x, grid))
    assert not rounded[0].any()


def test_a_token_has_a_scale_of_its_own():
    x = gaussian(2, 4 * 16).view(2, 4, 16)
    alone = InputGrid("int8").nearest(x[:, 1:2])
    x[:, 0] *= 1000
    assert torch.equal(InputGrid("int8").nearest(x)[:, 1:2], alone)
    assert not torch.equal(InputGrid.fit(x.abs().max(), "int8", x.dtype).nearest(x)[:, 1:2], alone)


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_one_scale_spans_what_calibration_saw(data_type):
    for dtype in DTYPES:
        for largest in (0.0, 1e-9, 3.0, 1e30):
            grid = InputGrid.fit(torch.tensor(largest), data_type, dtype)
            assert grid.scale.shape == (1,) and grid.scale.dtype == dtype
            assert grid.scale > 0 and torch.isfinite(grid.scale * 448).all()
    grid = InputGrid.fit(torch.tensor(3.0), data_type, torch.float32)
    x = torch.linspace(-3, 3, 61).view(1, 61, 1)
    assert (grid.nearest(x) - x).abs().max() < 0.1
    assert grid.nearest(x * 100).abs().max() <= 3.05, "what is larger is cut off"


def test_words_name_the_type_and_the_scales():
    assert InputGrid("int8").words == "int8 per token"
    assert InputGrid.fit(torch.ones(()), "fp8", torch.float32).words == "fp8 per tensor"


def test_half_precision_is_kept():
    x = gaussian(3, 8).view(1, 3, 8).to(torch.bfloat16)
    assert same_bits(InputGrid("fp8").nearest(x), simulated(x, InputGrid("fp8")))
