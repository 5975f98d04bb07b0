"""A few layers after every order, each with a draw of its own."""

import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.calibration.walk import walk
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.error import squared_error
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Order
from optimum_order.search.sketch import Sketch, spread

FORWARD = Order.parse("wanda:0.5 > gptq:4")
REVERSE = Order.parse("gptq:4 > wanda:0.5")


@pytest.fixture
def runner(make_compressor):
    return make_compressor().runner(progress=False)


@pytest.fixture
def draws(runner):
    ids = torch.cat([batch["input_ids"] for batch in runner.batches(0)])
    return [[{"input_ids": part}] for part in ids.split(2)]


@pytest.fixture
def sketch(runner, draws):
    return Sketch(runner, [FORWARD, REVERSE], draws)


def gather(runner, batches):
    """Return the inputs of every layer in the original model, from a walk."""
    statistics = {}
    runner.reset()
    options = {"needs": {Gram}, "execution": runner.execution}
    with contextlib.closing(walk(runner.model, runner.units, batches, **options)) as visits:
        for visit in visits:
            statistics |= visit.statistics
    return statistics


def weights(runner):
    """Return the weights that the model has now."""
    return {target.name: target.read() for unit in runner.units for target in unit.targets}


def test_a_layer_is_what_its_stages_make_of_it_with_its_own_draw(sketch, runner, draws):
    sketch.take(3, [FORWARD, REVERSE])
    statistics = [gather(runner, batches) for batches in draws]
    for order in (FORWARD, REVERSE):
        for name in sketch.layers[:3]:
            state = runner.original.states[name]
            for stage in order:
                state = method(stage).apply(state, statistics[sketch.draw(name)][name])
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


# Noise in place of the layers that were not taken


@pytest.fixture
def aligned(sketch, runner, monkeypatch):
    """Statistics by layer: made up so that outputs exceed those of white weights, as trained ones do.

    They are in the place of those that the sketch gathers.
    """
    statistics = {}
    for name, state in runner.original.states.items():
        main = torch.linalg.svd(state.weight).Vh[0]
        gram = torch.eye(len(main)) + 10 * len(main) * main[:, None] * main
        statistics[name] = Statistics(64, {Gram: gram})
    monkeypatch.setattr(
        "optimum_order.search.sketch.glance",
        lambda model, targets, batches, dtype: {t.name: statistics[t.name] for t in targets},
    )
    sketch.take(4, [FORWARD])
    return statistics


def imagined(sketch, runner, order):
    """Return the noise in the layers that were not taken, by name."""
    sketch.imagine(order)
    return {
        name: weight - runner.original.states[name].weight
        for name, weight in weights(runner).items()
        if name not in sketch.states[order]
    }


def test_noise_makes_the_output_errors_of_the_layers_that_were_taken(sketch, runner, aligned):
    """On average over layers."""
    wanted = sum(sketch.errors[FORWARD].values()) / 4
    errors = []
    for name, noise in imagined(sketch, runner, FORWARD).items():
        size = squared_error(runner.original.states[name].weight, aligned[name])
        errors.append(squared_error(noise, aligned[name]) / size)
    assert len(errors) == 10
    assert sum(errors) / len(errors) == pytest.approx(wanted, rel=0.3)


def test_taken_layers_have_no_noise(sketch, runner):
    sketch.take(4, [FORWARD])
    sketch.imagine(FORWARD)
    written = weights(runner)
    for name in sketch.layers[:4]:
        assert torch.equal(written[name], sketch.states[FORWARD][name].weight)


def test_noise_is_white_and_its_size_follows_from_the_taken_layers(sketch, runner, aligned):
    """Relative to a weight: the mean error times how far outputs exceed those of white weights."""
    gains = []
    for name in sketch.layers[:4]:
        weight = runner.original.states[name].weight.double()
        gram = aligned[name][Gram].double()
        white = weight.square().mean() * len(weight) * gram.trace()
        gains.append(((weight @ gram) * weight).sum().item() / white.item())
    assert min(gains) > 2, "white weights would show no difference"
    size = sum(sketch.errors[FORWARD].values()) / 4 * sum(gains) / 4
    noises = imagined(sketch, runner, FORWARD)
    for name, noise in noises.items():
        square = runner.original.states[name].weight.square().mean().item()
        assert noise.square().mean().item() == pytest.approx(size * square, rel=0.1)
        assert abs(noise.mean().item()) < 0.1 * (size * square) ** 0.5
    flat = [noise.flatten()[:2048] / noise.std() for noise in noises.values()]
    for one, other in itertools.pairwise(flat):
        assert abs((one * other).mean().item()) < 0.1, "layers have noise of their own"


def test_noise_is_the_same_in_every_order_and_each_time(sketch, runner):
    """Only its size differs, so that orders differ by what was looked at and not by luck."""
    sketch.take(4, [FORWARD, REVERSE])
    first, second = (imagined(sketch, runner, order) for order in (FORWARD, REVERSE))
    means = [sum(sketch.errors[order].values()) for order in (FORWARD, REVERSE)]
    scale = (means[1] / means[0]) ** 0.5
    assert scale != pytest.approx(1, abs=1e-3)
    for name, noise in first.items():
        assert torch.allclose(second[name], scale * noise, rtol=1e-3, atol=1e-6)
    again = imagined(sketch, runner, FORWARD)
    assert all(torch.equal(again[name], noise) for name, noise in first.items())


def test_noise_does_not_depend_on_which_layers_were_taken(sketch, runner):
    sketch.take(2, [FORWARD])
    before = imagined(sketch, runner, FORWARD)
    sketch.take(6, [FORWARD])
    after = imagined(sketch, runner, FORWARD)
    for name, noise in after.items():
        scale = noise.norm() / before[name].norm()
        assert torch.allclose(noise, scale * before[name], rtol=1e-3, atol=1e-6)


def test_without_data_layers_are_judged_by_their_weights(runner):
    order = Order.parse("magnitude:0.5 > rtn:4")
    sketch = Sketch(runner, [order], [])
    sketch.take(2, [order])
    for name in sketch.layers[:2]:
        before = runner.original.states[name].weight.float()
        after = sketch.states[order][name].weight.float()
        error = (after - before).square().sum() / before.square().sum()
        assert sketch.errors[order][name] == pytest.approx(error.item(), rel=1e-5)
    logarithms = [math.log(sketch.errors[order][name]) for name in sketch.layers[:2]]
    assert sketch.logarithms(order).tolist() == pytest.approx(logarithms, rel=1e-5)


def test_what_decides_across_layers_is_refused(runner):
    with pytest.raises(OrderError, match="more than one layer"):
        Sketch(runner, [Order.parse("magnitude:0.5 > mixed_precision:4")], [])


@settings(deadline=None)
@given(st.integers(1, 300))
def test_layers_are_each_taken_once_and_the_first_lie_all_over(count):
    order = spread(count)
    assert sorted(order) == list(range(count))
    if count >= 4:
        first = sorted(order[:4])
        following = [*first[1:], first[0] + count]
        assert max(b - a for a, b in zip(first, following, strict=True)) <= count / 2
