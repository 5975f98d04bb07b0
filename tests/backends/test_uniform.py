import pytest

from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.state import LayerState
from optimum_order.order import Stage
from optimum_order.testing import DTYPES


@pytest.fixture(params=["rtn", "gptq"])
def quantizer(request):
    return request.param


def test_auto_is_the_largest_of_128_64_32_that_divides_or_the_row(quantizer):
    backend = method(Stage(quantizer, 4))
    sizes = {256: 128, 4096: 128, 192: 64, 96: 32, 100: -1, 31: -1, 128: 128, 320: 64}
    for inputs, group in sizes.items():
        assert backend.options.group_for(inputs) == group
        assert backend.check_shape((8, inputs)) is None


def test_a_group_size_that_does_not_divide_names_those_that_do(quantizer):
    backend = method(Stage(quantizer, bits=4, group_size=64))
    assert backend.check_shape((8, 128)) is None
    assert backend.check_shape((8, 96)) == (
        "group_size 64 does not divide its 96 inputs; 8, 12, 16, 24, 32, 48, 96 or -1 do"
    )
    assert method(Stage(quantizer, bits=4, group_size=-1)).check_shape((8, 97)) is None


def test_a_width_that_nothing_divides_leaves_the_row(quantizer):
    reason = method(Stage(quantizer, bits=4, group_size=2)).check_shape((8, 7))
    assert reason == "group_size 2 does not divide its 7 inputs; -1 does"


def test_bits_are_two_to_eight(quantizer):
    message = r"'bits' \(width of a weight\) must be an integer in 2\.\.8, got"
    for bits in (1, 9, 0, -4, 4.0, "four", True):
        with pytest.raises(OrderError, match=message):
            method(Stage(quantizer, bits))


def test_bits_must_be_given(quantizer):
    message = rf"Stage '{quantizer}' must give 'bits' \(width of a weight\)"
    with pytest.raises(OrderError, match=message):
        method(Stage(quantizer))


def test_a_group_size_is_auto_minus_one_or_positive(quantizer):
    message = r"'group_size' .* must be auto, -1 for the whole row, or a positive integer"
    for size in (0, -2, 1.5, "rows", True):
        with pytest.raises(OrderError, match=message):
            method(Stage(quantizer, bits=4, group_size=size))


def test_clip_is_mse_or_none(quantizer):
    with pytest.raises(OrderError, match=r"'clip' .* must be mse or none, got 'max'"):
        method(Stage(quantizer, bits=4, clip="max"))


def test_every_option_reaches_the_grid(quantizer, gaussian, inputs):
    options = {"bits": 3, "group_size": 16, "symmetric": False}
    state = LayerState(gaussian())
    grid = method(Stage(quantizer, **options, clip="mse")).apply(state, inputs()).grid
    assert (grid.bits, grid.group_size, grid.symmetric) == (3, 16, False)
    whole = method(Stage(quantizer, **options, clip="none")).apply(state, inputs()).grid
    assert (grid.scale <= whole.scale).all()
    assert (grid.scale < whole.scale).any()


def test_scales_are_in_the_dtype_in_which_they_are_stored(quantizer, gaussian, inputs):
    for dtype in DTYPES:
        state = method(Stage(quantizer, 4)).apply(LayerState(gaussian(dtype=dtype)), inputs())
        assert state.grid.scale.dtype == dtype
        assert state.bits == 4


def test_a_second_quantization_replaces_the_first(quantizer, gaussian, inputs):
    first = method(Stage("rtn", 8)).apply(LayerState(gaussian()))
    second = method(Stage(quantizer, bits=3, group_size=8)).apply(first, inputs())
    assert (second.grid.bits, second.grid.group_size) == (3, 8)
