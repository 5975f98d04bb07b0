"""What formats share that store a layer as bytes."""

import pytest
import torch

from optimum_order.errors import ArtifactError
from optimum_order.formats.coded import Coded
from optimum_order.formats.sparse import Sparse


@pytest.mark.parametrize("codec", [Coded(), Sparse()], ids=lambda codec: codec.name)
@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"weight_scale": torch.ones(3)},
        {"weight": torch.zeros(90, dtype=torch.uint8), "weight_scale": torch.ones(3)},
        {"weight": torch.zeros(90)},
        {"weight": torch.zeros(90, dtype=torch.int8)},
        {"weight": torch.zeros(2, 90, dtype=torch.uint8)},
        {"weight": torch.zeros(0, dtype=torch.uint8)},
        {"weight": torch.zeros(27, dtype=torch.uint8)},
    ],
)
def test_tensors_of_no_layer_are_refused(codec, tensors):
    with pytest.raises(ArtifactError):
        codec.decode(tensors, {})
