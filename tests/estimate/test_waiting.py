"""The activations in flight are those of all batches, in the block that holds most."""

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.errors import ModelError
from optimum_order.estimate.size import empty
from optimum_order.estimate.trace import trace
from optimum_order.estimate.waiting import in_flight
from optimum_order.models.source import InMemory
from optimum_order.models.units import find_units


def batch(samples):
    return {"input_ids": torch.arange(samples * 16).view(samples, 16) % 64}


def test_bytes_grow_with_the_samples_of_all_batches(make_model):
    source = InMemory.of(make_model("llama"))
    model = empty(source)
    costs = trace(model, find_units(model), batch(2))
    most = max(cost.waiting + cost.working for cost in costs.values())
    assert in_flight(source, [batch(2)]) == most > 0
    # the last batch counts as the part of one that it is
    assert in_flight(source, [batch(2), batch(2), batch(1)]) == int(most * 2.5)
    assert all(not parameter.is_meta for parameter in source.model.parameters())


def test_nothing_is_said_where_a_forward_cannot_be_followed(make_model, monkeypatch):
    source = InMemory.of(make_model("llama"))
    forward = type(source.model.model).forward

    def looks_at_numbers(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if output.last_hidden_state.sum().item() == 0:
            raise LookupError("of no kind that anybody expects")
        return output

    monkeypatch.setattr(type(source.model.model), "forward", looks_at_numbers)
    assert in_flight(source, [batch(2)]) is None
    with pytest.raises(ModelError, match="looks at numbers"):
        compressor = JointCompressor(
            source.model, calibration=batch(4)["input_ids"], sequence_length=16
        )
        compressor.estimate("gptq:4")


def test_nothing_is_said_where_a_layer_is_multiplied_twice(make_model):
    model = make_model("llama")
    up = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.gate_proj = up
    assert in_flight(InMemory.of(model), [batch(2)]) is None
