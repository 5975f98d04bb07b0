"""The cost of a computation, from the operators that torch runs: products, bytes moved, bytes held.

A forward is traced on the meta device, where shapes flow through a model and no numbers do.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from optimum_order.calibration.capture import PRODUCTS
from optimum_order.errors import ModelError
from optimum_order.models import hf
from optimum_order.models.units import Target, Unit

_ATEN = torch.ops.aten
_QUESTIONS = {_ATEN.all.default: True, _ATEN.any.default: False}
# Operations in each factorization of an (n, n) matrix, over n^3; triangular solves are inverses.
_FACTORIZATIONS: dict[Any, float] = {
    _ATEN.linalg_cholesky_ex: 1 / 3,
    _ATEN.cholesky_inverse: 2 / 3,
    _ATEN.linalg_solve_triangular: 1 / 3,
}
_PRODUCTS: dict[Any, tuple[int, int]] = PRODUCTS | {functional.conv2d: (0, 1)}


class Counter(TorchDispatchMode):
    """Counts while it is active.

    On the meta device it also answers what a program asks of the numbers, as if all were well: all
    conditions hold, no exception is there, what is compared is equal, and numbers are zero.

    Attributes:
        products: Floating-point operations of matrix products and convolutions.
        factors: Floating-point operations of Cholesky factorisations and inverses.
        traffic: Bytes that every other operator reads and writes.
        held: Bytes of tensors that were made since it began and are still there.
        peak: The most of those at any time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.factors = self.traffic = 0.0
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS and args[0].is_meta:
            return torch.tensor(_QUESTIONS[func])
        if func is _ATEN.equal.default and args[0].is_meta:
            return True
        if func is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return 0
        output = func(*args, **kwargs)
        returns = func._schema.returns
        if returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write:
            return output  # a view
        name = func._overloadpacket
        plain = getattr(
            _ATEN, func._schema.name.removeprefix("aten::").removesuffix("_"), name
        )  # addmm_ is addmm
        if plain in flop_registry:
            self.products += flop_registry[plain](*args, **kwargs, out_val=output)
        elif plain in _FACTORIZATIONS:
            self.factors += _FACTORIZATIONS[plain] * args[0].shape[-1] ** 3
        else:
            self.traffic += size_of((args, kwargs, output))
        for storage in _storages(output):
            self._watch(storage)
        return output

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.held += self._sizes[key]
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def size_of(tree: Any) -> int:
    """Bytes of all tensors in nested containers."""
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Input:
    """A tensor that layers read.

    Args:
        width: Numbers in a row of it.
        rows: How many rows it has in one batch.
    """

    width: int
    rows: int


@dataclass
class UnitCost:
    """What running one unit on one batch takes.

    Args:
        products: Floating-point operations of its matrix products.
        traffic: Bytes that all else in it reads and writes.
        waiting: Bytes that a forward has made and not let go of when it arrives at the unit.
        working: Bytes that it has on top of those at most while it is in the unit.
        inputs: The distinct inputs of its layers.
        leaders: For each layer that was reached, the first that read the same input.
        reads: The layers in the order in which they were multiplied, once for each time.
    """

    products: float = 0.0
    traffic: float = 0.0
    waiting: int = 0
    working: int = 0
    inputs: list[Input] = field(default_factory=list)
    leaders: dict[str, str] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)


def trace(
    model: PreTrainedModel, units: Sequence[Unit], batch: Mapping[str, Tensor]
) -> dict[str, UnitCost]:
    """Send the shapes of one batch through a model.

    Args:
        model: On the meta device.
        units: From `find_units(model)`.
        batch: Keyword arguments of a forward; only their shapes and dtypes are looked at.

    Returns:
        The cost of each unit that the forward reached, by name.

    Raises:
        ModelError: If the forward needs numbers: every value that is looked at is zero here.
    """
    costs = {unit.name: UnitCost() for unit in units}
    _send(model, units, batch, costs)
    return costs


def forward_cost(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> UnitCost:
    """Return what one forward of a whole model takes, without its inputs.

    Args:
        model: On the meta device.
        batch: Keyword arguments of a forward; only their shapes and dtypes are looked at.

    Raises:
        ModelError: If the forward needs numbers: every value that is looked at is zero here.
    """
    counter = _send(model, (), batch, {})
    return UnitCost(counter.products, counter.traffic, working=counter.peak)


def _send(
    model: PreTrainedModel,
    units: Sequence[Unit],
    batch: Mapping[str, Tensor],
    costs: dict[str, UnitCost],
) -> Counter:
    """Send the shapes of one batch through a model, and fill in the costs of its units."""
    counter = Counter()
    spy = _Spy(units, costs, counter)
    for unit in units:
        unit.module.forward = spy.watched(unit, unit.module.forward)
    experts = [module for module in model.modules() if hf.experts_transposed(module) is not None]
    for module in experts:
        module.forward = spy.routed(module)
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in batch.items()}
    dtype = model.dtype
    meta = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in meta.items()
    }
    arguments = hf.uncached(model)
    try:
        with torch.no_grad(), counter, spy:
            model(**meta, **arguments)
    except Exception as error:  # a model's own code may raise anything about numbers
        raise ModelError(
            f"What {type(model).__name__} takes cannot be told from shapes alone: its forward "
            f"looks at numbers ({type(error).__name__}). Run it on a few samples, and measure."
        ) from error
    finally:
        for module in [*(unit.module for unit in units), *experts]:
            del module.forward
    return counter


class _Spy(TorchFunctionMode):
    """Notices which unit runs and which of its layers read the same input."""

    def __init__(self, units: Sequence[Unit], costs: dict[str, UnitCost], counter: Counter):
        super().__init__()
        self.costs, self.counter = costs, counter
        self.cost: UnitCost | None = None
        targets = [target for unit in units for target in unit.targets]
        self.by_parameter: dict[int, list[Target]] = {}
        for target in targets:
            self.by_parameter.setdefault(id(target.parameter), []).append(target)
        self._seen: list[tuple[Tensor, Any, str]] = []

    def watched(self, unit: Unit, forward: Any) -> Any:
        """The unit's forward, its cost written down."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.cost, counter = self.costs[unit.name], self.counter
            before = counter.products, counter.traffic, counter.held
            counter.peak = counter.held
            try:
                return forward(*args, **kwargs)
            finally:
                self.cost.products += counter.products - before[0]
                self.cost.traffic += counter.traffic - before[1]
                self.cost.waiting, self.cost.working = before[2], counter.peak - before[2]
                self.cost = None
                self._seen.clear()

        return run

    def routed(self, module: nn.Module) -> Any:
        """Return a stand-in for the forward of fused experts, which would look at the routing."""
        parameters = [parameter for parameter in module.parameters() if parameter.ndim == 3]

        def run(hidden: Tensor, index: Tensor, *rest: Any) -> Tensor:
            tokens = hidden.numel() // hidden.shape[-1]
            routed = tokens * (index.shape[-1] if index.ndim > 1 else 1)
            for parameter in parameters:
                self.counter.products += 2 * routed * math.prod(parameter.shape[1:])
                self.counter.traffic += routed * sum(parameter.shape[1:]) * hidden.element_size()
                for target in self.by_parameter.get(id(parameter), []):
                    self._add(target, max(1, routed // len(parameter)))
            return torch.empty_like(hidden)

        return run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        output = func(*args, **kwargs)
        places = _PRODUCTS.get(func)
        if places and self.cost is not None and len(args) > places[1]:
            x, weight = args[places[0]], args[places[1]]
            for target in self.by_parameter.get(id(weight), []):
                if target.kind == "conv2d":  # a different way over the image is a different input
                    how = (weight.shape[2:], args[3:], tuple(kwargs.items()))
                    self._see(target, x, output.numel() // output.shape[1], how)
                else:
                    self._see(target, x, x.numel() // x.shape[-1])
        return output

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Its products only: no kernel that is used today keeps the scores."""
        self.counter.products += 2 * query.numel() * key.shape[
            -2
        ] + 2 * query.numel() // query.shape[-1] * (key.shape[-2] * value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    def _see(self, target: Target, x: Tensor, rows: int, how: Any = None) -> None:
        assert self.cost is not None
        self.cost.reads.append(target.name)
        how = (how, target.rows)  # the groups of a convolution read different channels
        leader = next(
            (name for seen, way, name in self._seen if way == how and _same(seen, x)), None
        )
        if leader is None:
            self._add(target, rows)
            self._seen.append((x, how, target.name))
        else:
            self.cost.leaders[target.name] = leader

    def _add(self, target: Target, rows: int) -> None:
        assert self.cost is not None
        self.cost.inputs.append(Input(target.view.shape[1], rows))
        self.cost.leaders[target.name] = target.name


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.storage_offset() == other.storage_offset()
        and one.numel() == other.numel()
    )
