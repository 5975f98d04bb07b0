"""A transform leaves the function of the model as it is, and that is checked on a batch."""

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.calibration.execution import PAUSES
from optimum_order.engine.recipe import method
from optimum_order.engine.transform import transform
from optimum_order.errors import DataError, InvariantError
from optimum_order.models.units import find_units
from optimum_order.order import Stage

INPUTS = torch.arange(24).view(2, 12) % 61


def logits(model):
    with torch.no_grad():
        return model(INPUTS).logits


def test_the_weights_change_and_the_outputs_do_not(make_model, batches, plugins):
    model = make_model("llama")
    up = model.model.layers[0].mlp.up_proj.weight.clone()
    before = logits(model)
    transform(method(Stage("permute")), model, batches)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, up.flip(0))
    torch.testing.assert_close(logits(model), before)
    assert not torch.is_inference(model.model.layers[0].mlp.up_proj.weight)


def test_another_function_is_refused(make_model, batches, plugins):
    with pytest.raises(InvariantError, match=r"changed an output by .* a bug in the"):
        transform(method(Stage("permute", 1.1)), make_model("llama"), batches)
    with pytest.raises(InvariantError, match="changed an output by nan"):
        transform(method(Stage("permute", 1e38)), make_model("llama"), batches)


def test_there_must_be_a_batch_to_check_on(make_model, plugins):
    with pytest.raises(DataError, match=r"is checked on a batch: pass calibration"):
        transform(method(Stage("permute")), make_model("llama"), [])


def test_stages_behind_treat_the_rewritten_layers(make_model, batches, run, plugins, weights_of):
    """A permutation of channels changes nothing for a method that treats each row alike."""
    for pause in PAUSES:
        model = make_model("llama")
        result = run(model, "permute > rtn(bits=4, group_size=-1)", batches, pause=pause)
        plain = make_model("llama")
        run(plain, "rtn(bits=4, group_size=-1)", batches, pause=pause)
        weights = weights_of(plain)
        for unit in find_units(model):
            for target in unit.targets:
                expected = weights[target.name]
                if "down_proj" in target.name:
                    expected = expected.flip(1)
                elif ".mlp." in target.name:
                    expected = expected.flip(0)
                assert torch.equal(target.read(), expected)
                assert torch.equal(result.states[target.name].weight, expected)
                stages = [record.stage for record in result.records[target.name]]
                assert stages == ["permute:1.0", "rtn(bits=4, group_size=-1)"]


def test_from_the_front_door_to_a_saved_folder(make_model, plugins, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model("llama")
    ids = torch.randint(2, 60, (6, 24), generator=torch.Generator().manual_seed(0))
    compressor = JointCompressor(model, calibration=ids, sequence_length=24, device="cpu")
    compressed = compressor.compress("permute > wanda:0.5", progress=False)
    compressed.save_pretrained(tmp_path / "out", format="dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(compressed.model))
    assert compressed.manifest["stages"][0]["method"] == "permute"


def test_without_calibration_a_transform_is_refused_before_work(make_model, plugins):
    with pytest.raises(DataError, match="calibration"):
        JointCompressor(make_model("llama")).compress("permute > rtn:4", progress=False)
