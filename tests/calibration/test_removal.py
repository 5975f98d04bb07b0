"""The loss without a block is that of the model without it."""

import copy

import pytest
import torch
from torch.nn import functional

from optimum_order.calibration.removal import losses_without
from optimum_order.models.architecture import require_roles
from optimum_order.models.sizes import keep_blocks

SAMPLES = [{"input_ids": torch.arange(12)[None] * 5 % 61}, {"input_ids": torch.arange(9)[None]}]


@pytest.mark.parametrize(
    ("architecture", "changes"), [("llama", {"num_hidden_layers": 5}), ("gpt2", {"n_layer": 5})]
)
@pytest.mark.parametrize("removed", [[], [2]])
def test_it_is_that_of_a_model_without_the_block(make_model, architecture, changes, removed):
    model = make_model(architecture, **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    roles = require_roles(model)
    candidates = [index for index in (1, 2, 3) if index not in removed]
    losses = losses_without(model, roles, SAMPLES, removed, candidates)
    assert list(losses) == candidates
    for candidate in candidates:
        shorter = copy.deepcopy(model)
        gone = {candidate, *removed}
        keep_blocks(shorter, require_roles(shorter), [i for i in range(5) if i not in gone])
        expected = 0.0
        with torch.no_grad():
            for sample in SAMPLES:
                rows = model(**sample).logits[0].log_softmax(-1)
                others = shorter(**sample).logits[0].log_softmax(-1)
                expected += functional.kl_div(
                    others, rows, log_target=True, reduction="batchmean"
                ).item() / len(SAMPLES)
        assert losses[candidate] == pytest.approx(expected, rel=1e-4)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_logits_is_compared_by_its_output(make_model):
    model = make_model("bert", num_hidden_layers=4)
    losses = losses_without(model, require_roles(model), SAMPLES, [], [1, 2])
    with torch.no_grad():
        expected = 0.0
        shorter = copy.deepcopy(model)
        keep_blocks(shorter, require_roles(shorter), [0, 2, 3])
        for sample in SAMPLES:
            whole = model(**sample).last_hidden_state
            apart = shorter(**sample).last_hidden_state - whole
            expected += (apart.square().sum() / whole.square().sum()).item() / len(SAMPLES)
    assert losses[1] == pytest.approx(expected, rel=1e-4)
