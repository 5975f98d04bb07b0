import copy

import pytest
import torch

from optimum_order.calibration import precision
from optimum_order.calibration.accumulate import Accumulator
from optimum_order.calibration.walk import walk
from optimum_order.errors import DataError
from optimum_order.layers.statistics import Gram
from optimum_order.models.units import find_units

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "units", "expected"),
    [
        ("auto", torch.float32, True, torch.bfloat16),
        ("auto", torch.float32, False, torch.float32),
        ("auto", torch.bfloat16, False, torch.bfloat16),
        ("auto", torch.float16, True, torch.float32),  # bfloat16 would lose three of its digits
        ("float32", torch.float32, True, torch.float32),
        ("bfloat16", torch.float32, False, torch.bfloat16),
    ],
)
def test_bfloat16_where_it_costs_nothing_or_the_processor_is_made_for_it(
    monkeypatch, name, dtype, units, expected
):
    monkeypatch.setattr(precision, "has_units", lambda device: units)
    assert precision.choose(name, dtype, CPU) == expected


def test_another_choice_is_refused():
    with pytest.raises(DataError, match=r"'float16'\. .*auto, bfloat16, float32"):
        precision.choose("float16", torch.float32, CPU)


def test_the_precision_of_others_is_left_as_it_was():
    before = torch.get_float32_matmul_precision()
    with precision.products(torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), precision.products(torch.bfloat16):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def test_sums_stay_float32():
    """A bfloat16 sum of so many ones would stop at 256."""
    accumulator = Accumulator(4, gram=True, device=CPU, dtype=torch.bfloat16)
    for _ in range(3):
        accumulator.add(torch.ones(1000, 4))
    assert torch.equal(accumulator.result().gram, torch.full((4, 4), 3000.0))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bert"])
def test_statistics_are_those_of_float32_to_a_percent(make_model, batches, architecture):
    model = make_model(architecture)
    units = find_units(model)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[dtype] = {}
        walk(
            model,
            units,
            batches,
            lambda at, d=dtype: found[d].update(at.statistics),
            gram=True,
            dtype=dtype,
        )
    exact, fast = found.values()
    assert any(not torch.equal(fast[name].gram, exact[name].gram) for name in exact)
    for name, known in exact.items():
        if (
            known.tokens and known.tokens == fast[name].tokens
        ):  # a router may send a token elsewhere
            apart = (fast[name].gram - known[Gram]).norm() / known[Gram].norm()
            assert apart < 0.02, name
            assert fast[name].gram.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_the_rest_of_a_model_gets_what_it_always_does(
    make_image_model, image_batches, architecture
):
    """What is left of the forward behind a block runs as ever, on the dtype that it expects."""
    model = make_image_model(architecture)
    outputs = []
    units = find_units(model)
    walk(
        model,
        units,
        image_batches,
        lambda at: outputs.append(at.outputs()),
        gram=True,
        dtype=torch.bfloat16,
    )
    assert all(torch.isfinite(output).all() for output in outputs)


def test_weights_that_a_visit_changes_are_cast_anew(make_model, batches):
    model = make_model("llama")
    changed = copy.deepcopy(model)
    for unit in find_units(changed):
        for target in unit.targets:
            target.write(target.read() * 0.5)
    last = {}

    def halve(at):
        for target in at.unit.targets:
            target.write(target.read() * 0.5)
        last[at.unit.name] = at.outputs()

    walk(model, find_units(model), batches, halve, gram=False, dtype=torch.bfloat16)
    expected = {}
    walk(
        changed,
        find_units(changed),
        batches,
        lambda at: expected.update({at.unit.name: at.outputs()}),
        gram=False,
        dtype=torch.bfloat16,
    )
    assert all(torch.equal(last[name], expected[name]) for name in expected)
