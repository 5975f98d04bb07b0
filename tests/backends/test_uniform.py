import pytest
import torch

from optimum_order.backends.obs import Factor
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.error import squared_error
from optimum_order.layers.grids.superblock import SuperblockGrid
from optimum_order.layers.grids.uniform import UniformGrid
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
    message = r"'bits' \(width of a weight, .*\) must be fp8, q2_k, .* or an integer in 2\.\.8, got"
    for bits in (1, 9, 0, -4, 4.0, "four", "Q4_K", True):
        with pytest.raises(OrderError, match=message):
            method(Stage(quantizer, bits))


def test_bits_must_be_given(quantizer):
    message = rf"Stage '{quantizer}' must give 'bits' \(width of a weight, fp8 for"
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


KINDS = {"q2_k": 4, "q3_k": 4, "q4_k": 5, "q5_k": 5, "q6_k": 8}
"""The bits of the rows that superblocks do not divide."""


def make(text):
    return method(Stage.parse(text))


def test_a_k_quant_prints_and_parses_as_one_word(quantizer):
    for kind in KINDS:
        backend = make(f"{quantizer}:{kind}")
        assert str(backend.stage) == f"{quantizer}:{kind}"
        # they are float16 numbers anyway
        assert make(f"{quantizer}(bits={kind}, scales=float16)").stage == backend.stage
        affine = kind not in ("q3_k", "q6_k")
        assert backend.makes_zero is not affine
        zero = make(f"{quantizer}(bits={kind}, zero=true)")
        assert zero.makes_zero and (zero.stage != backend.stage) is affine
    assert make(f"{quantizer}(bits=4, zero=true)").stage == make(f"{quantizer}:4").stage


def test_what_a_k_quant_has_of_its_own_is_refused(quantizer):
    for option in ("group_size=32", "symmetric=false", "clip=none"):
        with pytest.raises(OrderError, match=f"q4_k has blocks .* leave out '{option[:4]}"):
            make(f"{quantizer}(bits=q4_k, {option})")


def test_a_k_quant_takes_rows_of_whole_superblocks_and_others_fall_to_blocks(
    quantizer, gaussian, inputs
):
    for kind, bits in KINDS.items():
        backend = make(f"{quantizer}:{kind}")
        whole = backend.apply(LayerState(gaussian(8, 512)), inputs("correlated", 1024, 512))
        assert isinstance(whole.grid, SuperblockGrid) and whole.grid.kind == kind
        assert whole.notes == ()
        assert backend.check_shape((8, 96)) is None
        other = backend.apply(LayerState(gaussian(8, 96)), inputs("correlated", 200, 96))
        assert isinstance(other.grid, UniformGrid)
        assert (other.bits, other.grid.unit) == (bits, 32)
        assert other.grid.symmetric is (kind != "q5_k")
        assert torch.equal(other.grid.scale.half().float(), other.grid.scale.float())
        (note,) = other.notes
        assert f"no multiple of 256, so it has {bits} bits in groups of 32" in note
        assert "of 32 where these do not divide a row" in backend.check_shape((8, 40))


def test_layers_are_pruned_before_a_k_quant_and_after_one_with_zero(quantizer, gaussian, inputs):
    statistics = inputs("correlated", 1024, 512)
    for kind in KINDS:
        pruned = make("wanda:0.5").apply(LayerState(gaussian(8, 512)), statistics)
        before = make(f"{quantizer}:{kind}").apply(pruned, statistics)
        assert before.grid.has_zero and before.sparsity == 0.5
        quantized = make(f"{quantizer}(bits={kind}, zero=true)").apply(
            LayerState(gaussian(8, 512)), statistics
        )
        for start in (before, quantized):
            for pruner in ("magnitude:0.7", "sparsegpt:0.7"):
                after = make(pruner).apply(start, statistics)
                assert after.grid is start.grid and after.sparsity == pytest.approx(0.7, abs=1e-3)


def test_a_layer_without_zero_on_its_grid_is_not_pruned_on_it(gaussian, inputs):
    statistics = inputs("correlated", 1024, 512)
    state = make("rtn:q4_k").apply(LayerState(gaussian(8, 512)))
    assert not state.grid.has_zero
    with pytest.raises(OrderError, match="zero is not on the layer's grid. Prune first, quantize"):
        make("wanda:0.5").apply(state, statistics)
    assert make("wanda(sparsity=0.5, off_grid=true)").apply(state, statistics).grid is None


def test_a_sweep_on_superblocks_beats_rounding_on_them(gaussian, inputs):
    """And its scales count errors as the sweep does."""
    statistics = inputs("correlated", 1024, 512)
    weight = gaussian(32, 512)
    for kind in KINDS:
        errors = []
        for text in (f"gptq:{kind}", f"rtn:{kind}"):
            after = make(text).apply(LayerState(weight), statistics)
            errors.append(squared_error(after.weight - weight, statistics))
        assert errors[0] < 0.8 * errors[1], kind
    factor = Factor.of(statistics, 0.01, act_order=True)
    expected = SuperblockGrid.fit(weight, "q4_k", importance=factor.importance, zero=False)
    grid = make("gptq:q4_k").apply(LayerState(weight), statistics).grid
    assert torch.equal(grid.factor, expected.factor)
    # column by column, in the order of W
    place = int(factor.columns[3])
    assert factor.importance[place] == 1 / factor.U[3, 3] ** 2
