import pytest
import torch

from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage


@pytest.fixture(params=["rtn", "gptq"])
def quantiser(request):
    return request.param


@pytest.mark.parametrize(
    ("inputs", "group"),
    [(256, 128), (4096, 128), (192, 64), (96, 32), (100, -1), (31, -1), (128, 128), (320, 64)],
)
def test_auto_is_the_largest_of_128_64_32_that_divides_or_the_row(quantiser, inputs, group):
    backend = method(Stage(quantiser, 4))
    assert backend.options.group_for(inputs) == group
    assert backend.check_shape((8, inputs)) is None


def test_a_group_size_that_does_not_divide_names_those_that_do(quantiser):
    backend = method(Stage(quantiser, bits=4, group_size=64))
    assert backend.check_shape((8, 128)) is None
    assert backend.check_shape((8, 96)) == (
        "group_size 64 does not divide its 96 inputs; 8, 12, 16, 24, 32, 48, 96 or -1 do"
    )
    assert method(Stage(quantiser, bits=4, group_size=-1)).check_shape((8, 97)) is None


def test_a_width_that_nothing_divides_leaves_the_row(quantiser):
    reason = method(Stage(quantiser, bits=4, group_size=2)).check_shape((8, 7))
    assert reason == "group_size 2 does not divide its 7 inputs; -1 does"


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "four", True])
def test_bits_are_two_to_eight(quantiser, bits):
    with pytest.raises(
        OrderError, match=r"'bits' \(width of a weight\) must be an integer in 2\.\.8, got"
    ):
        method(Stage(quantiser, bits))


def test_bits_must_be_given(quantiser):
    with pytest.raises(
        OrderError, match=rf"Stage '{quantiser}' must give 'bits' \(width of a weight\)"
    ):
        method(Stage(quantiser))


@pytest.mark.parametrize("size", [0, -2, 1.5, "rows", True])
def test_a_group_size_is_auto_minus_one_or_positive(quantiser, size):
    with pytest.raises(
        OrderError,
        match=r"'group_size' .* must be auto, -1 for the whole row, or a positive integer",
    ):
        method(Stage(quantiser, bits=4, group_size=size))


def test_clip_is_mse_or_none(quantiser):
    with pytest.raises(OrderError, match=r"'clip' .* must be mse or none, got 'max'"):
        method(Stage(quantiser, bits=4, clip="max"))


def test_every_option_reaches_the_grid(quantiser, gaussian, inputs):
    stage = Stage(quantiser, bits=3, group_size=16, symmetric=False, clip="mse")
    grid = method(stage).apply(LayerState(gaussian()), inputs()).grid
    assert (grid.bits, grid.group_size, grid.symmetric) == (3, 16, False)
    plain = Stage(quantiser, bits=3, group_size=16, symmetric=False, clip="none")
    whole = method(plain).apply(LayerState(gaussian()), inputs()).grid
    assert (grid.scale <= whole.scale).all()
    assert (grid.scale < whole.scale).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_in_the_dtype_they_are_stored_in(quantiser, dtype, gaussian, inputs):
    state = method(Stage(quantiser, 4)).apply(LayerState(gaussian(dtype=dtype)), inputs())
    assert state.grid.scale.dtype == dtype
    assert state.bits == 4


def test_a_second_quantisation_replaces_the_first(quantiser, gaussian, inputs):
    first = method(Stage("rtn", 8)).apply(LayerState(gaussian()))
    second = method(Stage(quantiser, bits=3, group_size=8)).apply(first, inputs())
    assert (second.grid.bits, second.grid.group_size) == (3, 8)
