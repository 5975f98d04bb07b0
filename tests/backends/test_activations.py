"""Grids of inputs: what a stage sets, and what stages after it see of the rounding."""

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.backends.activations import Activations
from optimum_order.engine.recipe import Recipe, method
from optimum_order.errors import DataError, ModelError, OrderError
from optimum_order.layers.inputs import InputGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import AbsMax, Statistics
from optimum_order.models.units import find_units
from optimum_order.order import Order, Stage
from optimum_order.testing import BackendContract, gaussian


class TestContract(BackendContract):
    backend = Activations
    stages = ("activations:8", "activations:fp8", "activations(bits=8, per=tensor)")


def test_the_scale_of_all_tokens_spans_the_largest_input():
    X = gaussian(50, 32)
    backend = method(Stage.parse("activations(bits=fp8, per=tensor)"))
    statistics = Statistics.of(X, [AbsMax])
    for dtype in (torch.float32, torch.bfloat16):
        state = backend.apply(LayerState(gaussian(8, 32).to(dtype)), statistics)
        assert torch.equal(state.inputs.scale, (X.abs().max() / 448).to(dtype).view(1))


def test_tokens_get_their_scales_without_data():
    stages = "rtn(bits=8, group_size=-1) > activations:8"
    assert not Recipe.of(Order.parse(stages)).needs_data
    state = method(Stage.parse("activations:8")).apply(LayerState(gaussian(8, 32)))
    assert state.inputs == InputGrid("int8")


def test_one_scale_needs_data(make_model):
    recipe = Recipe.of(Order.parse("activations(bits=8, per=tensor)"))
    assert recipe.needs_data
    with pytest.raises(DataError, match="needs calibration data and none was given"):
        recipe.check(find_units(make_model("llama")), calibrated=False)


def test_only_linear_layers_are_covered(make_model):
    backend = method(Stage.parse("activations:8"))
    kinds = ("linear", "expert", "conv1d", "conv2d", "embedding")
    assert [backend.covers("a", kind) for kind in kinds] == [True, False, False, False, False]
    recipe = Recipe.of(Order.parse("activations:8"))
    with pytest.raises(
        OrderError, match="treats no layer of this model: its layers are of the kind conv1d"
    ):
        recipe.check(find_units(make_model("gpt2")), calibrated=True)


def test_a_transform_cannot_follow_unless_inputs_are_given_up(make_model):
    units = find_units(make_model("llama"))
    with pytest.raises(OrderError, match="cannot follow 'activations:8'"):
        Recipe.of(Order.parse("activations:8 > rotate")).check(units, calibrated=True)


def logits(compressed):
    with torch.no_grad():
        return compressed.model(input_ids=IDS).logits


IDS = torch.arange(2, 26).view(2, 12)


def test_later_stages_see_rounded_inputs(make_compressor):
    """The Gram matrix of gptq is that of what the layer really multiplies."""
    compressor = make_compressor()
    first, second = (
        compressor.compress(order, progress=False)
        for order in ("activations:8 > gptq:3", "gptq:3 > activations:8")
    )
    name = next(iter(first.layers))
    changed = [
        not torch.equal(first.layers[layer].weight, second.layers[layer].weight)
        for layer in first.layers
    ]
    assert all(changed), name
    assert all(one.inputs == InputGrid("int8") for one in first.layers.values())
    plain = compressor.compress("gptq:3", progress=False)
    weights = [plain.layers[layer].weight for layer in plain.layers]
    for weight, layer in zip(weights, second.layers.values(), strict=True):
        assert torch.equal(weight, layer.weight), "the weights stay as they are"
    assert not torch.equal(logits(plain), logits(second))
    with pytest.raises(ModelError, match="save it and give the folder"):
        JointCompressor(second.model)
