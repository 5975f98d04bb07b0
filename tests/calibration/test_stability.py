"""A model that changes its own weights is refused before anything is calibrated."""

import pytest
import torch

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
