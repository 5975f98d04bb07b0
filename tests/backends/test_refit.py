"""A refit brings a model nearer to the original and leaves every code and every zero as it is."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_order import CompressedModel
from optimum_order.backends.refit import gains
from optimum_order.errors import OrderError
from optimum_order.layers.grids.uniform import UniformGrid

REFIT = "refit(steps=40, rate=0.01)"


@pytest.mark.parametrize(
    ("order", "part"),
    [
        ("magnitude:0.5", 0.9),
        ("rtn(bits=3, group_size=32)", 0.9),
        ("rtn(bits=3, group_size=32, symmetric=false)", 0.9),
        ("magnitude:0.4 > rtn(bits=3, group_size=-1)", 0.9),
        ("ecsq:2.5", 1.0),
        ("bitsandbytes(dtype=nf4, blocksize=32)", 1.0),  # norms alone
    ],
)
def test_the_model_comes_nearer_and_codes_and_zeros_stay(order, part, learning):
    mine = learning.compressor()
    before = mine.compress(order, progress=False)
    after = mine.compress(f"{order} > {REFIT}", progress=False)
    original = learning.make()
    assert learning.divergence(after.model, original) < part * learning.divergence(
        before.model, original
    )
    for name, state in after.layers.items():
        earlier = before.layers[name]
        state.check(name)
        assert torch.equal(state.mask, earlier.mask), name
        assert torch.equal(state.weight == 0, earlier.weight == 0), name
        if state.grid is not None:
            codes = [one.grid.quantize(one.weight) for one in (state, earlier)]
            assert torch.equal(*codes), name
    moved = [not torch.equal(s.weight, before.layers[n].weight) for n, s in after.layers.items()]
    assert all(moved) or (order.startswith("bitsandbytes") and not any(moved))
    assert any(not torch.equal(g, torch.ones_like(g)) for g in gains(after.model).values())
    assert "refit" not in str(after.manifest.get("smaller", ""))


def test_targets_and_norms_leave_the_rest_alone(learning):
    mine = learning.compressor()
    order = "rtn(bits=3, group_size=32)"
    before = mine.compress(order, progress=False)
    stage = "refit(steps=10, rate=0.01, targets=*.q_proj)"
    chosen = mine.compress(f"{order} > {stage}", progress=False)
    for name, state in chosen.layers.items():
        same = torch.equal(state.weight, before.layers[name].weight)
        assert same is not name.endswith("q_proj"), name
    without = mine.compress(f"{order} > refit(steps=10, rate=0.01, norms=false)", progress=False)
    for model in (chosen.model, without.model):
        assert all(torch.equal(g, torch.ones_like(g)) for g in gains(model).values())


@pytest.mark.parametrize("format", ["compressed-tensors", "coded", "dense"])
def test_what_was_measured_is_what_loads(format, tmp_path, learning):
    mine = learning.compressor(dtype=torch.bfloat16)
    order = "ecsq:3" if format == "coded" else "rtn(bits=4, group_size=32)"
    compressed = mine.compress(f"{order} > {REFIT} > wanda:0.3", progress=False)
    compressed.save_pretrained(tmp_path / "out", format=format)
    if format == "coded":
        loaded = CompressedModel.from_pretrained(tmp_path / "out").model
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, compressed.model.eval()(ids).logits)
    gained = gains(compressed.model)
    assert any(not torch.equal(gain, torch.ones_like(gain)) for gain in gained.values())
    for name, gain in gains(loaded).items():
        assert torch.equal(gain, gained[name]), name


def test_scales_of_float16_stay_such(gaussian, learning):
    grid = UniformGrid.fit(gaussian().bfloat16(), bits=4, group_size=8, short_scales=True)
    other = grid.with_scales(grid.scales.float() * 1.0371)
    assert torch.equal(other.scale.half().to(torch.bfloat16), other.scale)
    small = UniformGrid.fit(1e-9 * gaussian(), bits=4, group_size=8)
    assert (small.with_scales(small.scales * 1.0371).scale < 1e-8).all(), "nothing asked for that"


def test_a_study_that_shares_beginnings_starts_from_the_refitted_norms(tmp_path, learning):
    """The gains go with the prefix, and the next order begins from the original ones."""
    mine = learning.compressor()
    orders = [f"rtn(bits=3, group_size=32) > {REFIT} > wanda:{s}" for s in (0.2, 0.4)]
    direct = [mine.compress(order, progress=False) for order in orders]
    from optimum_order.engine.runner import Prefixes, Runner
    from optimum_order.order import Order

    samples = mine.draw()
    runner = Runner(
        mine.source,
        lambda draw, count: samples.inputs(),
        mine.execution(mine.source.load(), "block", progress=False),
        prefixes=Prefixes(tmp_path / "prefixes", 10**9),
    )
    for order, whole in zip(orders, direct, strict=True):
        runner.run(runner.check(Order.parse(order)))
        for name, gain in gains(runner.model).items():
            assert torch.equal(gain, gains(whole.model)[name]), name
    runner.reset()
    assert all(torch.equal(g, torch.ones_like(g)) for g in gains(runner.model).values())


def test_options_are_checked(learning):
    for stage, message in {
        "refit:0": "a positive integer",
        "refit(rate=1.5)": "between 0 and 1",
        "refit(norms=1)": "true or false",
    }.items():
        with pytest.raises(OrderError, match=message):
            learning.compressor().compress(f"rtn:4 > {stage}", progress=False)
