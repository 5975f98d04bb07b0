"""Contract suites: subclass one in the tests of a plug-in, and pytest runs it.

```python
from optimum_order.testing import CodecContract


class TestMyCodec(CodecContract):
    def codec(self):
        return MyCodec()

    def states(self):
        yield LayerState(...)
```
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from optimum_order.errors import ArtifactError
from optimum_order.formats import Codec, outline
from optimum_order.layers.state import LayerState
from optimum_order.layers.tree import tensors_in
from optimum_order.models.units import Target, find_targets


class CodecContract(ABC):
    """What every codec keeps."""

    @abstractmethod
    def codec(self) -> Codec:
        """Return the codec."""

    @abstractmethod
    def states(self) -> Iterator[LayerState]:
        """Yield layers that the codec encodes: every kind of grid, width, dtype and mask."""

    def refused(self) -> Iterator[LayerState]:
        """Yield layers that the codec cannot hold, whatever their values are."""
        yield from ()

    def target(self) -> Target:
        """Return where the layers are in a model; by default an `nn.Linear`."""
        return find_targets(nn.ModuleList([nn.Linear(1, 1)]))[0]

    def test_decode_returns_what_was_encoded(self) -> None:
        """Weight and grid come back bit for bit, and the mask if there is one."""
        codec = self.codec()
        count = 0
        for state in self.states():
            state.check("yielded by states()")
            assert codec.encodes(state)
            scheme = json.loads(json.dumps(codec.scheme(state)))
            decoded = codec.decode(codec.encode(state), scheme)
            assert same_bits(decoded.weight, state.weight)
            assert type(decoded.grid) is type(state.grid)
            for one, other in zip(tensors_in(decoded.grid), tensors_in(state.grid), strict=True):
                assert same_bits(one, other)
            if decoded.pruned is not None:
                assert torch.equal(decoded.pruned, state.mask)
            decoded.check("decoded")
            count += 1
        assert count, "states() yields no layer"

    def test_tensors_have_declared_names(self) -> None:
        """A loader finds the tensors of a layer by the names in `tensors`."""
        codec = self.codec()
        for state in self.states():
            assert set(codec.encode(state)) <= set(codec.tensors)

    def test_size_is_known_from_shapes(self) -> None:
        """`size` of an outline is the size of the tensors, or no less where it is not exact."""
        codec = self.codec()
        for state in self.states():
            size = sum(tensor.nbytes for tensor in codec.encode(state).values())
            for known in (codec.size(state), codec.size(outline(state))):
                assert known.bytes == size if known.exact else known.bytes >= size

    def test_refusals_need_no_values(self) -> None:
        """`why_not` says of an outline what it says of the layer."""
        codec = self.codec()
        target = self.target()
        for state in self.states():
            assert codec.why_not(target, state) is None
            assert codec.why_not(target, outline(state)) is None
            assert codec.why_not_values(state) is None
        for state in self.refused():
            reason = codec.why_not(target, outline(state))
            assert reason and reason == codec.why_not(target, state)

    def test_damaged_tensors_are_refused_or_another_layer(self) -> None:
        """No tensors at all are an ArtifactError; damaged ones may also be a layer that is sound.

        Nothing else may be raised: tensors come from files that nobody has checked.
        """
        codec = self.codec()
        for state in self.states():
            scheme = codec.scheme(state)
            for damaged in _damaged(codec.encode(state)):
                try:
                    decoded = codec.decode(damaged, scheme)
                except ArtifactError:
                    continue
                assert damaged, "decoded without any tensor"
                decoded.check("decoded from damaged tensors")


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, so that -0.0 is not 0.0.

    Args:
        one: A tensor.
        other: Another.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (t.contiguous().flatten().view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


def _damaged(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a layer with all or one missing, one cut, longer or of another kind."""
    yield {}
    for name, tensor in tensors.items():
        yield {key: value for key, value in tensors.items() if key != name}
        if tensor.ndim:
            yield tensors | {name: tensor[:-1]}
            yield tensors | {name: torch.cat([tensor, tensor[:1]])}
        yield tensors | {name: tensor.to(torch.float64)}
        yield tensors | {name: tensor[None]}
