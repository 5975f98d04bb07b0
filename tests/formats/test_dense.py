import pytest
import torch

from optimum_order.errors import ArtifactError
from optimum_order.formats.base import outline
from optimum_order.formats.dense import Dense
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState


def test_the_weight_is_stored_as_it_is():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(6, 32).to(dtype)
        grid = UniformGrid.fit(weight, bits=3, group_size=16, symmetric=False)
        state = LayerState(grid.nearest(weight), grid=grid)
        codec = Dense()
        encoded = codec.encode(state)
        assert list(encoded) == ["weight"] and not codec.encodes(state)
        assert codec.size(outline(state)).bytes == state.weight.nbytes
        decoded = codec.decode(encoded, codec.scheme(state))
        assert torch.equal(decoded.weight, state.weight) and decoded.weight.dtype == dtype
        assert decoded.grid is None and decoded.pruned is None


def test_what_is_no_matrix_is_refused():
    for weight in (torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.int8)):
        with pytest.raises(ArtifactError, match="must be a floating-point matrix"):
            Dense().decode({"weight": weight}, {})
