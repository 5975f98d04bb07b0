import dataclasses
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from optimum_order.layers.tree import map_tensors, tensors_in


@dataclasses.dataclass(frozen=True)
class Pair:
    first: Any
    second: Any = None
    size: int = dataclasses.field(default=3, init=False)


ONE, TWO, THREE = (torch.full((1,), number) for number in (1, 2, 3))


def test_tensors_are_seen_in_every_container():
    value = [ONE, (Pair(TWO, {"a": Pair(THREE)}), "text", None, 4)]
    assert [int(tensor) for tensor in tensors_in(value)] == [1, 2, 3]
    assert tensors_in(BaseModelOutput(last_hidden_state=ONE)) == [ONE]
    assert tensors_in("text") == tensors_in(None) == tensors_in(Pair) == []


def test_only_tensors_change():
    value = [ONE, (Pair(TWO, {"a": Pair(THREE)}), "text", None, 4)]
    doubled = map_tensors(lambda tensor: tensor * 2, value)
    assert [int(tensor) for tensor in tensors_in(doubled)] == [2, 4, 6]
    assert [int(tensor) for tensor in tensors_in(value)] == [1, 2, 3]
    assert isinstance(doubled[1][0], Pair) and doubled[1][1:] == ("text", None, 4)


def test_the_output_of_a_model_stays_one():
    output = map_tensors(lambda tensor: tensor * 2, BaseModelOutput(last_hidden_state=ONE))
    assert type(output) is BaseModelOutput and int(output.last_hidden_state) == 2


def test_a_dataclass_without_tensors_is_shared():
    pair = Pair("a", (1, 2))
    assert map_tensors(torch.Tensor.double, pair) is pair
