"""Statistics in one forward are those of a walk that changes nothing."""

import pytest
import torch

from optimum_order.calibration.glance import glance
from optimum_order.layers.statistics import Gram
from optimum_order.models.units import find_units


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 32, (2, 16), generator=generator)} for _ in range(2)]


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_glance_sees_what_a_walk_sees(make_model, batches, collect, architecture):
    model = make_model(architecture)
    units = find_units(model)
    targets = [target for unit in units for target in unit.targets][1::2]
    walked = collect(model, units, batches).statistics
    seen = glance(model, targets, batches)
    assert list(seen) == [target.name for target in targets]
    for name, statistics in seen.items():
        assert statistics.tokens == walked[name].tokens
        assert torch.allclose(statistics[Gram], walked[name][Gram], rtol=1e-4, atol=1e-4)


def test_a_glance_multiplies_in_its_dtype(make_model, batches, collect):
    model = make_model("llama")
    units = find_units(model)
    targets = units[1].targets
    exact = glance(model, targets, batches, torch.float32)
    rounded = glance(model, targets, batches, torch.bfloat16)
    walked = collect(model, units, batches, dtype=torch.bfloat16).statistics
    for target in units[1].targets:
        one = rounded[target.name][Gram]
        apart = (one - exact[target.name][Gram]).norm()
        assert 1e-4 * one.norm() < apart < 2e-2 * one.norm()
        assert (one - walked[target.name][Gram]).norm() < 0.1 * apart
