"""A model that changes its own weights is refused before anything is calibrated."""

import pytest
import torch
import transformers

from optimum_order.calibration.stability import check_forward, unchanged
from optimum_order.errors import ModelError

IDS = {"input_ids": torch.arange(32).view(2, 16)}


def test_any_way_of_changing_a_weight_is_seen(make_model):
    def write(weight):
        weight.mul_(0.5)

    def write_behind(weight):
        weight.data.mul_(0.5)

    for change in (write, write_behind):
        model = make_model("llama")
        weight = model.model.layers[1].mlp.up_proj.weight
        with (
            pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight"),
            torch.no_grad(),
            unchanged(model, "a test"),
        ):
            change(weight)
    model = make_model("llama")
    check_forward(model, IDS)
    meta = model.to("meta")
    check_forward(meta, IDS)
    with pytest.raises(ModelError), torch.no_grad(), unchanged(meta, "a test"):
        meta.model.layers[0].mlp.up_proj.weight.mul_(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_weight_that_changes_is_seen(dtype):
    """Whatever its size, its place in memory, and the place that changes."""
    memory = torch.arange(1.0, 30.0, dtype=dtype)
    for weight in (memory[:19], memory[1:], memory[:1], memory[3:11], memory[:28].view(4, 7).T):
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(weight)
        for place in range(weight.numel()):
            changed = weight.flatten().clone()
            changed[place] += 1
            with pytest.raises(ModelError), unchanged(model, "a test"):
                model.weight.data = changed.view(weight.shape)
            model.weight.data = weight
        with unchanged(model, "a test"):
            model.weight.data = weight.clone()


def test_a_forward_that_fails_is_one_line_before_the_work():
    config = transformers.GPTJConfig(
        vocab_size=64, n_embd=32, n_head=4, n_layer=1, n_positions=64, rotary_dim=64
    )
    model = transformers.GPTJForCausalLM(config).eval()
    message = r"GPTJForCausalLM fails on the calibration data \(input_ids \(1, 9\)\): The size of"
    with pytest.raises(ModelError, match=message) as error:
        check_forward(model, {"input_ids": torch.full((2, 9), 5)})
    assert "\n" not in str(error.value)


def test_a_model_that_takes_whole_windows_only_is_no_failure(monkeypatch):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=1)
    ).eval()
    forward = model.forward

    def whole(input_ids, **options):
        assert input_ids.shape == (1, 32)
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", whole)
    check_forward(model, {"input_ids": torch.full((2, 32), 5)})
