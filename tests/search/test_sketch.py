"""A few layers after every order, each with a draw of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_order.calibration.walk import walk
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.order import Order
from optimum_order.search.sketch import Sketch, spread

FORWARD, REVERSE = Order.parse("wanda:0.5 > gptq:4"), Order.parse("gptq:4 > wanda:0.5")


@pytest.fixture
def runner(make_compressor):
    return make_compressor()._runner(progress=False)


@pytest.fixture
def draws(runner):
    ids = torch.cat([batch["input_ids"] for batch in runner.batches(0)])
    return [[{"input_ids": part}] for part in ids.split(2)]


@pytest.fixture
def sketch(runner, draws):
    return Sketch(runner, [FORWARD, REVERSE], draws)


def gathered(runner, batches):
    seen = {}
    runner.reset()
    walk(
        runner.model,
        runner.units,
        batches,
        lambda at: seen.update(at.statistics),
        gram=True,
        dtype=runner.dtype,
    )
    return seen


def test_a_layer_is_what_its_stages_make_of_it_with_its_own_draw(sketch, runner, draws):
    sketch.take(3, [FORWARD, REVERSE])
    seen = [gathered(runner, batches) for batches in draws]
    for order in (FORWARD, REVERSE):
        for name in sketch.layers[:3]:
            state = runner.original.states[name]
            for stage in order:
                state = method(stage).apply(state, seen[sketch.draw(name)][name])
            assert torch.equal(state.weight, sketch.states[order][name].weight)
    assert {sketch.draw(name) for name in sketch.layers[:2]} == {0, 1}


def test_layers_are_taken_once_and_in_the_same_way_whatever_fits_in_memory(
    sketch, runner, draws, monkeypatch
):
    done = []
    small = Sketch(runner, [FORWARD, REVERSE], draws, lambda: done.append(1))
    sketch.take(len(sketch.layers), [FORWARD, REVERSE])
    monkeypatch.setattr("optimum_order.search.sketch._GRAM_BYTES", 1)
    for count in (2, 2, len(sketch.layers)):
        small.take(count, [FORWARD, REVERSE])
    assert len(done) == len(sketch.layers) == len(set(sketch.layers)) == len(runner.original.states)
    assert small.errors == sketch.errors


def test_a_model_is_written_with_what_was_taken_and_without_what_is_left_out(sketch, runner):
    sketch.take(4, [FORWARD])
    written = sketch.layers[:4]
    for without in (None, 0, 1):
        sketch.write(FORWARD, without=without)
        for unit in runner.units:
            for target in unit.targets:
                known = target.name in written and sketch.draw(target.name) != without
                states = sketch.states[FORWARD] if known else runner.original.states
                assert torch.equal(target.read(), states[target.name].weight)


def test_noise_in_place_of_unknown_layers_makes_the_errors_of_the_known_ones(sketch, runner, draws):
    """Relative output errors on average over layers, which is what the noise is made for."""
    sketch.take(4, [FORWARD])
    sketch.imagine(FORWARD)
    known = sketch.layers[:4]
    wanted = sum(sketch.errors[FORWARD][name] for name in known) / len(known)
    weights = {target.name: target.read() for unit in runner.units for target in unit.targets}
    runner.reset()
    seen = gathered(runner, [batch for batches in draws for batch in batches])
    errors = []
    for name, state in runner.original.states.items():
        if name in known:
            assert torch.equal(weights[name], sketch.states[FORWARD][name].weight)
        else:
            size = seen[name].squared_error(state.weight)
            errors.append(
                seen[name].squared_error(weights[name].float() - state.weight.float()) / size
            )
    assert sum(errors) / len(errors) == pytest.approx(wanted, rel=0.5)


def test_without_data_layers_are_judged_by_their_weights(runner):
    order = Order.parse("magnitude:0.5 > rtn:4")
    sketch = Sketch(runner, [order], [])
    sketch.take(2, [order])
    for name in sketch.layers[:2]:
        before, after = (
            runner.original.states[name].weight.float(),
            sketch.states[order][name].weight.float(),
        )
        error = (after - before).square().sum() / before.square().sum()
        assert sketch.errors[order][name] == pytest.approx(error.item(), rel=1e-5)
    assert sketch.logarithms(order).tolist() == pytest.approx(
        [torch.tensor(sketch.errors[order][name]).log().item() for name in sketch.layers[:2]],
        rel=1e-5,
    )


def test_what_decides_across_layers_is_refused(runner):
    with pytest.raises(OrderError, match="more than one layer"):
        Sketch(runner, [Order.parse("magnitude:0.5 > mixed_precision:4")], [])


@given(st.integers(1, 300))
def test_layers_are_each_taken_once_and_the_first_lie_all_over(count):
    order = spread(count)
    assert sorted(order) == list(range(count))
    if count >= 4:
        first = sorted(order[:4])
        gaps = [
            after - before
            for before, after in zip(first, [*first[1:], first[0] + count], strict=True)
        ]
        assert max(gaps) <= count / 2
