"""What a run remembers of layers before it treats the first, and how a killed run goes on."""

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.backends.ecsq import ECSQ
from optimum_order.backends.rate import entropy
from optimum_order.calibration.execution import Execution
from optimum_order.engine.passes import Passes
from optimum_order.engine.recipe import Recipe
from optimum_order.engine.run import Subject, run
from optimum_order.models.units import find_units
from optimum_order.order import Order
from optimum_order.testing import same


def bits(states):
    """Return the bits for each weight of codes with one table for each layer."""
    total = weights = 0
    for state in states.values():
        codes = state.grid.quantize(state.weight).flatten().long()
        total += entropy(torch.bincount(codes - codes.min())[None])
        weights += len(codes)
    return total / weights


def compress(model, batches, text, **options):
    units = find_units(model)
    return run(Subject(model, units, batches), Recipe.of(Order.parse(text)), Execution(**options))


@pytest.mark.parametrize("pause", ["block", "group"])
@pytest.mark.parametrize("sensitivity", ["none", "within", "across", "auto"])
def test_every_choice_has_about_the_rate(make_model, batches, pause, sensitivity):
    model = make_model("llama")
    text = f"ecsq(rate=5, sensitivity={sensitivity})"
    result = compress(model, batches, text, pause=pause)
    for unit in find_units(model):
        for target in unit.targets:
            assert torch.equal(target.read(), result.states[target.name].weight)
    assert 2 < bits(result.states) < 5  # the rest is what rows and columns of a tiny layer take


def test_layers_that_matter_more_get_more_bits(make_model, batches, monkeypatch):
    """One slope for all: four times the sensitivity is half the step."""
    from optimum_order.engine.passes import look

    shares = {}
    original = ECSQ._shares

    def noted(self, engine):
        shares.update(original(self, engine))
        return shares

    def loud(model, units, samples):
        names = [target.name for unit in units for target in unit.targets]
        return {
            n: torch.ones(len(samples), t.view.shape[0]) * (4.0 if n == names[0] else 1.0)
            for n, t in zip(names, (t for u in units for t in u.targets), strict=True)
        }

    monkeypatch.setattr(ECSQ, "_shares", noted)
    steps = []
    for function in (loud, lambda *args: {n: g / g for n, g in loud(*args).items()}):
        monkeypatch.setattr(look, "output_sensitivities", function)
        compress(make_model("llama"), batches, "ecsq(rate=4, sensitivity=across)")
        first, *_, last = shares.values()
        steps.append(first.log_step - last.log_step)
    assert steps[0] - steps[1] == pytest.approx(-1.0, abs=0.05)


def test_a_choice_is_kept_by_a_killed_run(tiny_llama_folder, tmp_path, monkeypatch):
    """The same layers, bit for bit, whether it was cut off in the profile, or after the choice."""
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))

    def compressor():
        return JointCompressor.from_pretrained(
            str(tiny_llama_folder), calibration=ids, sequence_length=16
        )

    whole = compressor().compress("ecsq:4", work_dir=tmp_path / "whole", progress=False)
    saves = []
    original = Passes._keep

    def until(limit):
        def keep(self, *args, **options):
            if len(saves) == limit:
                raise KeyboardInterrupt
            saves.append(args)
            original(self, *args, **options)

        return keep

    for limit in (1, 4):
        saves.clear()
        work = tmp_path / f"cut{limit}"
        monkeypatch.setattr(Passes, "_keep", until(limit))
        with pytest.raises(KeyboardInterrupt):
            compressor().compress("ecsq:4", work_dir=work, progress=False)
        monkeypatch.setattr(Passes, "_keep", original)
        again = compressor().compress("ecsq:4", work_dir=work, resume=True, progress=False)
        assert set(again.layers) == set(whole.layers)
        for name, state in whole.layers.items():
            assert same(state, again.layers[name]), (limit, name)


def test_a_model_that_is_streamed_gives_every_layer_the_rate(tiny_llama_folder, tmp_path, caplog):
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    compressor = JointCompressor.from_pretrained(
        str(tiny_llama_folder), calibration=ids, sequence_length=16
    )
    streamed = compressor.compress(
        "ecsq:4", work_dir=tmp_path / "work", low_memory=True, progress=False
    )
    assert "every layer gets the same rate" in caplog.text
    plain = compressor.compress("ecsq(rate=4, sensitivity=none)", pause="block", progress=False)
    for name, state in plain.layers.items():
        assert torch.equal(state.weight, streamed.layers[name].weight), name
