"""What orders do to some layers: errors and bytes as those of the layers themselves."""

import pytest

from optimum_order.engine.recipe import canonical, method
from optimum_order.errors import OrderError
from optimum_order.formats.coded import Coded
from optimum_order.layers.error import relative_error
from optimum_order.order import Order, Stage
from optimum_order.search.looks import look


@pytest.fixture(scope="module")
def runner(make_compressor):
    return make_compressor().runner(progress=False)


def order(text):
    return canonical(Order.parse(text))


def test_errors_and_bytes_are_means_over_layers(runner):
    """Without data all is known: the layers are compressed here, one by one."""
    orders = {order("rtn:4"): Coded(), order("magnitude:0.5 > rtn:4"): None}
    count = len(runner.original.states)
    steps = []
    looks = look(runner, runner.batches(0), orders, count, lambda: steps.append(1))
    assert len(steps) == count
    rounded = method(Stage("rtn", 4))
    after = {name: rounded.apply(s, None) for name, s in runner.original.states.items()}
    encoded = [Coded().encode(state) for state in after.values()]
    total = sum(tensor.nbytes for tensors in encoded for tensor in tensors.values())
    weights = sum(state.weight.numel() for state in after.values())
    rtn = looks[order("rtn:4")]
    assert rtn.bits == pytest.approx(8 * total / weights)
    assert rtn.layers == count
    assert looks[order("magnitude:0.5 > rtn:4")].bits is None
    assert looks[order("magnitude:0.5 > rtn:4")].error > 3 * rtn.error > 0


def test_more_bits_are_less_error_and_corrections_less_than_none(runner):
    orders = dict.fromkeys(map(order, ["rtn:3", "gptq:3", "gptq:4", "gptq:2"]))
    looks = look(runner, runner.batches(0), orders, 4)
    errors = {str(o): seen.error for o, seen in looks.items()}
    assert errors["gptq:4"] < errors["gptq:3"] < errors["gptq:2"]
    assert errors["gptq:3"] < errors["rtn:3"]


def test_an_allocator_is_as_good_as_what_it_chooses(runner):
    texts = ["mixed_precision(bits=3, widths=[2,4])", "gptq:2", "gptq:4"]
    mixed, narrow, wide = map(order, texts)
    codec = Coded()
    looks = look(runner, runner.batches(0), dict.fromkeys([mixed, narrow, wide], codec), 4)
    assert looks[wide].error < looks[mixed].error < looks[narrow].error
    assert looks[narrow].bits < looks[mixed].bits < looks[wide].bits
    alone = look(runner, runner.batches(0), {mixed: codec}, 4)
    assert alone[mixed] == looks[mixed]


def test_the_model_is_left_as_it_was(runner):
    before = {name: state.weight.clone() for name, state in runner.original.states.items()}
    look(runner, runner.batches(0), {order("rtn:2"): None}, 2)
    for unit in runner.units:
        for target in unit.targets:
            error = relative_error(before[target.name], target.read(), None)[0]
            assert error == 0


def test_stages_that_look_at_the_whole_model_are_refused(runner):
    with pytest.raises(OrderError, match="more than one layer"):
        look(runner, runner.batches(0), {order("rtn:4 > mixed_precision:3"): None}, 1)
