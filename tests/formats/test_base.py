"""What codecs and containers are given: layers, their outlines, and where the layers are."""

import pytest
import torch

from optimum_order.errors import FormatError
from optimum_order.formats.base import Contents, Layers, grid_of, outline
from optimum_order.formats.safetensors import Safetensors
from optimum_order.layers.grids.bitsandbytes import BlockGrid
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.tree import tensors_in


@pytest.mark.parametrize(
    "order",
    [
        "magnitude:0.5",
        "magnitude:0.5 > rtn(bits=3, group_size=16, symmetric=false)",
        "bitsandbytes(dtype=nf4, double_quant=true)",
        "bitsandbytes:int8",
    ],
)
def test_an_outline_has_everything_but_values(applied, order):
    state = applied(order, LayerState(torch.randn(32, 64), notes=("a note",)))
    outlined = outline(state)
    assert all(tensor.is_meta for tensor in tensors_in(outlined))
    assert outlined.weight.shape == (32, 64) and outlined.notes == ("a note",)
    assert (outlined.pruned is None) == (state.pruned is None)
    assert type(outlined.grid) is type(state.grid)
    assert (outlined.bits, outlined.weight.dtype) == (state.bits, state.weight.dtype)
    for name in ("unit", "group_size", "symmetric", "dtype", "data_type"):
        assert getattr(outlined.grid, name, None) == getattr(state.grid, name, None)


def test_layers_read_a_state_when_it_is_asked_for():
    read = []

    class States(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    layers = iter(Layers({"a": 1, "b": 2, "c": 3}, States(a="one", b="two")))
    assert read == []
    assert next(layers) == ("a", 1, "one") and read == ["a"]
    assert list(layers) == [("b", 2, "two")] and read == ["a", "b"]


def test_the_layout_of_contents_is_made_once(make_model):
    contents = Contents(make_model("llama"), Layers({}, {}))
    assert contents.layout is contents.layout
    assert contents.layout.tensors.keys() == contents.model.state_dict().keys()
    assert Contents(contents.model, contents.layers, {"a": 1}).layout.tensors == {"a": 1}


def test_a_grid_of_another_kind_is_refused():
    weight = torch.randn(4, 8)
    state = LayerState(weight, grid=UniformGrid.fit(weight, bits=4))
    assert grid_of(state, UniformGrid) is state.grid
    with pytest.raises(FormatError, match="A BlockGrid is needed, got UniformGrid"):
        grid_of(state, BlockGrid)
    with pytest.raises(FormatError, match="got NoneType"):
        grid_of(LayerState(weight), UniformGrid)


def test_the_weight_files_of_a_folder_are_told_by_their_names(tmp_path):
    for name in ("b.safetensors", "a.safetensors", "config.json", "a.safetensors.index.json"):
        (tmp_path / name).touch()
    assert [file.name for file in Safetensors().files(tmp_path)] == [
        "a.safetensors",
        "b.safetensors",
    ]
