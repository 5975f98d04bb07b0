"""A model in other sizes is what its class makes of the config; and the way back is exact."""

import copy

import pytest
import torch

from optimum_order.errors import ModelError
from optimum_order.models.architecture import require_roles
from optimum_order.models.sizes import (
    Structure,
    keep_blocks,
    keep_experts,
    mismatch,
    resized,
    set_sizes,
)

IDS = torch.arange(24).view(2, 12) % 61


def test_resized_is_empty_and_leaves_the_model_alone(make_model):
    model = make_model("llama").bfloat16()
    before = model.config.to_dict()
    smaller = resized(model, {"intermediate_size": 24, "num_hidden_layers": 1})
    assert smaller.device.type == "meta" and smaller.dtype == torch.bfloat16
    assert not smaller.training
    assert smaller.model.layers[0].mlp.up_proj.weight.shape == (24, 32)
    assert len(smaller.model.layers) == 1
    assert model.config.to_dict() == before


def test_a_size_that_the_config_refuses_is_one_line(make_model):
    with pytest.raises(ModelError, match="not a multiple of the number of attention heads"):
        resized(make_model("llama"), {"num_attention_heads": 3})


def test_a_field_that_stands_under_another_name_is_found(make_model):
    """Qwen3-MoE writes num_local_experts into its config.json."""
    smaller = resized(make_model("qwen3_moe"), {"num_experts": 3})
    assert smaller.model.layers[0].mlp.experts.down_proj.shape[0] == 3


def test_a_mismatch_is_named(make_model):
    model = make_model("llama")
    assert mismatch(model, resized(model, {})) is None
    problem = mismatch(model, resized(model, {"intermediate_size": 24}))
    assert "gate_proj.weight' is (48, 32), and the config says (24, 32)" in problem
    assert "says None" in mismatch(model, resized(model, {"num_hidden_layers": 1}))


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3_moe"])
def test_what_was_changed_comes_back(make_model, architecture):
    model = make_model(architecture, num_hidden_layers=3)
    before = copy.deepcopy(model)
    config = model.config.to_dict()
    with torch.no_grad():
        expected = model(IDS).logits
    structure = Structure(model)
    roles = require_roles(model)
    if architecture != "llama":
        for block in roles.blocks:
            keep_experts(model, block, torch.tensor([0, 2, 3]))
        set_sizes(model, {roles.fields.experts: 3})
        assert model.model.layers[1].mlp.gate.num_experts == 3
    keep_blocks(model, roles, [0, 2])
    set_sizes(model, {"num_hidden_layers": 2})
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, expected)
    structure.restore()
    assert model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    originals = before.state_dict()
    assert model.state_dict().keys() == originals.keys()
    assert all(torch.equal(value, originals[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
