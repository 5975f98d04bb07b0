"""Where and how a run computes."""

import contextlib
from dataclasses import FrozenInstanceError

import pytest
import torch

from optimum_order.calibration.execution import Execution, InMemory
from optimum_order.models import precision
from optimum_order.models.units import find_units


class Recording(InMemory):
    """Notes which blocks come and go."""

    def __init__(self):
        self.events = []

    @contextlib.contextmanager
    def resident(self, unit):
        self.events.append(("come", unit and unit.name))
        try:
            yield
        finally:
            self.events.append(("go", unit and unit.name))


def test_calibration_multiplies_in_the_given_dtype_or_in_the_usual_one(make_model, monkeypatch):
    model = make_model("llama")
    assert Execution(dtype=torch.float16).matmul_dtype(model) == torch.float16
    for has_units, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "has_units", lambda device, answer=has_units: answer)
        assert Execution().matmul_dtype(model) == expected


def test_the_usual_dtype_is_that_of_the_device_of_the_run(make_model, monkeypatch):
    asked = []
    monkeypatch.setattr(precision, "has_units", lambda device: asked.append(device) or False)
    Execution(device=torch.device("meta")).matmul_dtype(make_model("llama"))
    assert asked == [torch.device("meta")]


def test_a_block_is_resident_while_the_context_is_active(make_model):
    unit = find_units(make_model("llama"))[0]
    residency = Recording()
    with pytest.raises(ZeroDivisionError), Execution(residency=residency).resident(unit):
        assert residency.events == [("come", unit.name)]
        raise ZeroDivisionError
    assert residency.events == [("come", unit.name), ("go", unit.name)]
    with Execution(residency=residency).resident(None):
        assert residency.events[-1] == ("come", None)


def test_a_block_is_brought_to_the_device_and_back(make_model):
    """ "cpu:0" and "cpu" are two devices to torch, so no GPU is needed to see the move."""
    model = make_model("llama")
    first, second = find_units(model)
    before = [parameter.clone() for parameter in first.module.parameters()]
    execution = Execution(device=torch.device("meta"))
    home = {parameter.device for parameter in model.parameters()}
    with torch.inference_mode(), execution.resident(None):
        assert {parameter.device for parameter in model.parameters()} == home
    execution = Execution(device=torch.device("cpu:0"))
    moved = []
    to = first.module.to
    first.module.to = lambda device: moved.append(device) or to(device)
    with torch.inference_mode(), execution.resident(first):
        assert moved == [torch.device("cpu:0")]
        assert {parameter.device for parameter in second.module.parameters()} == home
    assert moved == [torch.device("cpu:0"), torch.device("cpu")]
    for parameter, value in zip(first.module.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert not torch.is_inference(parameter), "its parameters are ordinary ones"


def test_what_is_in_memory_does_not_stream():
    execution = Execution()
    assert not execution.streams
    assert execution.residency.device is None
    with pytest.raises(FrozenInstanceError):
        execution.pause = "group"
