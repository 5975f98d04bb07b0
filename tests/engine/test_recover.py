"""A recovery moves weights on the masks and codes that they have; anything else is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.calibration.execution import PAUSES
from optimum_order.engine.recipe import method
from optimum_order.engine.recover import recover
from optimum_order.engine.run import Subject
from optimum_order.errors import InvariantError, ModelError
from optimum_order.models.units import find_units
from optimum_order.order import Stage

INPUTS = torch.arange(24).view(2, 12) % 61


def distance(model, original):
    """Return how far the layers of a model are from those of another."""
    pairs = zip(find_units(model), find_units(original), strict=True)
    targets = [pair for one, two in pairs for pair in zip(one.targets, two.targets, strict=True)]
    return sum((a.read() - b.read()).square().sum().item() for a, b in targets)


@pytest.mark.parametrize(
    "order", ["sparsegpt:0.5", "rtn(bits=2, clip=none)", "sparsegpt:0.5 > rtn:3"]
)
def test_layers_come_nearer_on_the_same_mask_and_codes(make_model, batches, run, plugins, order):
    """Sparsegpt moves the weights that stay, and plain rounding spans the extremes."""
    for pause in PAUSES:
        plain = make_model("llama")
        before = run(plain, order, batches, pause=pause)
        model = make_model("llama")
        result = run(
            model,
            f"{order} > mend",
            batches,
            pause=pause,
            original=lambda: make_model("llama"),
        )
        original = make_model("llama")
        assert distance(model, original) < 0.999 * distance(plain, original)
        targets = {t.name: t for unit in find_units(model) for t in unit.targets}
        for name, state in result.states.items():
            state.check(name)
            earlier = before.states[name]
            assert torch.equal(state.mask, earlier.mask)
            assert torch.equal(targets[name].read(), state.weight)
            if earlier.grid is not None:
                codes = earlier.grid.quantize(earlier.weight)
                assert torch.equal(state.grid.quantize(state.weight), codes)
            assert result.records[name][-1].stage == "mend:nothing"
            assert result.records[name][-1].relative_error > 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("mask", "the recovery changed the mask"),
        ("codes", "the recovery changed the layer's codes"),
        ("grid", "the recovery dropped or made a grid"),
    ],
)
def test_a_broken_promise_is_refused_by_name(make_model, batches, run, plugins, spoil, message):
    with pytest.raises(InvariantError, match=rf"q_proj, stage 'mend:{spoil}': {message}"):
        run(
            make_model("llama"),
            f"magnitude:0.5 > rtn:4 > mend:{spoil}",
            batches,
            original=lambda: make_model("llama"),
        )


def test_the_original_model_is_needed(make_model, plugins):
    model = make_model("llama")
    subject = Subject(model, find_units(model))
    with pytest.raises(ModelError, match="'mend:nothing' learns from the original model"):
        list(recover(method(Stage("mend")), subject, {}))


def test_from_the_front_door_to_a_saved_folder(make_model, plugins, tmp_path):
    original = make_model("llama")
    compressor = JointCompressor(original, device="cpu")
    plain = compressor.compress("rtn:3", progress=False)
    compressed = compressor.compress("rtn:3 > mend", progress=False)
    assert distance(compressed.model, original) < distance(plain.model, original)
    assert compressed.save_pretrained(tmp_path / "out") == "compressed-tensors"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUTS).logits, compressed.model(INPUTS).logits)
