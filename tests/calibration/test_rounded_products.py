"""A walk may multiply in bfloat16; sums stay float32, and the rest of the model sees no difference."""

import copy
from contextlib import closing

import pytest
import torch

from optimum_order.calibration.accumulate import Accumulation
from optimum_order.calibration.execution import PAUSES
from optimum_order.layers.statistics import Gram, SquaredNorms
from optimum_order.models.units import find_units

CPU = torch.device("cpu")


def test_sums_stay_float32():
    """A bfloat16 sum of so many ones would stop at 256."""
    sums = Accumulation(4, {Gram}, CPU, dtype=torch.bfloat16)
    for _ in range(3):
        sums.add(torch.ones(1000, 4))
    assert torch.equal(sums.result()[Gram], torch.full((4, 4), 3000.0))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bert"])
def test_statistics_are_those_of_float32_to_two_percent(make_model, batches, collect, architecture):
    model = make_model(architecture)
    units = find_units(model)
    for pause in PAUSES:
        exact, rounded = (
            collect(model, units, batches, pause=pause, dtype=dtype).statistics
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert any(not torch.equal(rounded[name][Gram], exact[name][Gram]) for name in exact)
        for name, statistics in exact.items():
            # A router may send a token elsewhere.
            if statistics.tokens and statistics.tokens == rounded[name].tokens:
                gram = statistics[Gram]
                apart = (rounded[name][Gram] - gram).norm() / gram.norm()
                assert apart < 0.02, (pause, name)
                assert rounded[name][Gram].dtype == torch.float32


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_the_rest_of_a_model_gets_its_own_dtype(
    make_image_model, image_batches, run_walk, architecture
):
    """The rest of the forward behind a block runs as ever."""
    model = make_image_model(architecture)
    units = find_units(model)
    for pause in PAUSES:
        options = {"pause": pause, "dtype": torch.bfloat16}
        with closing(run_walk(model, units, image_batches, **options)) as visits:
            for visit in visits:
                if pause == "block":
                    assert torch.isfinite(visit.outputs()).all()
                for statistics in visit.statistics.values():
                    assert torch.isfinite(statistics[SquaredNorms]).all()


def test_changed_weights_are_cast_anew(make_model, batches, collect, run_walk, halve):
    options = {"needs": [SquaredNorms], "dtype": torch.bfloat16}
    model = make_model("llama")
    changed = copy.deepcopy(model)
    for unit in find_units(changed):
        for target in unit.targets:
            target.write(target.read() * 0.5)
    with closing(run_walk(changed, find_units(changed), batches, **options)) as visits:
        expected = {visit.unit.name: visit.outputs() for visit in visits}
    with closing(run_walk(model, find_units(model), batches, **options)) as visits:
        for visit in visits:
            visit.outputs()
            halve(visit)
            assert torch.equal(visit.outputs(), expected[visit.unit.name])


def test_changed_weights_are_cast_anew_at_layers_too(make_model, batches, collect, halve):
    """A walk over a model that was changed before sees the same bits."""
    options = {"pause": "group", "dtype": torch.bfloat16}
    model = make_model("llama")
    walked = collect(model, find_units(model), batches, halve, **options)
    expected = collect(model, find_units(model), batches, **options)
    assert walked.layers == expected.layers
    for name, statistics in expected.statistics.items():
        assert torch.equal(walked.statistics[name][Gram], statistics[Gram]), name
