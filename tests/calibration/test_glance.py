"""Statistics in one forward are those of a walk that changes nothing."""

import pytest
import torch

from optimum_order.calibration.glance import glance
from optimum_order.calibration.walk import walk
from optimum_order.layers.statistics import Gram
from optimum_order.models.units import find_units


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_it_sees_what_a_walk_sees(make_model, architecture):
    model = make_model(architecture)
    units = find_units(model)
    targets = [target for unit in units for target in unit.targets][1::2]
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 32, (2, 16), generator=generator)} for _ in range(2)]
    walked = {}
    walk(
        model,
        units,
        batches,
        lambda at: walked.update(at.statistics),
        gram=True,
        dtype=torch.float32,
    )
    seen = glance(model, targets, batches)
    assert list(seen) == [target.name for target in targets]
    for name, statistics in seen.items():
        assert statistics.tokens == walked[name].tokens
        assert torch.allclose(statistics[Gram], walked[name].gram, rtol=1e-4, atol=1e-4)
