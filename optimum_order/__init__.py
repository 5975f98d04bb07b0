"""Joint model compression: prune and quantize a model, in the order that hurts the model least."""

import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

__version__ = "0.2.0.dev0"

__all__ = [
    "Accumulator",
    "Allocator",
    "Backend",
    "Codec",
    "CompressedModel",
    "Container",
    "Grid",
    "JointCompressor",
    "LayerState",
    "Metric",
    "OptimumOrderConfig",
    "OptimumOrderError",
    "Order",
    "Recovery",
    "Reshaper",
    "Stage",
    "Statistics",
    "Transform",
    "option",
]

if TYPE_CHECKING:
    from optimum_order.backends import (
        Allocator,
        Backend,
        Recovery,
        Reshaper,
        Transform,
        option,
    )
    from optimum_order.compressed import CompressedModel
    from optimum_order.compressor import JointCompressor
    from optimum_order.errors import OptimumOrderError
    from optimum_order.evaluation import Metric
    from optimum_order.formats import Codec, Container
    from optimum_order.integrations.on_load import OptimumOrderConfig
    from optimum_order.layers.grids.base import Grid
    from optimum_order.layers.state import LayerState
    from optimum_order.layers.statistics import Accumulator, Statistics
    from optimum_order.order import Order, Stage

# Nothing is imported before a name is asked for: `import optimum_order` stays fast.
_HOME = {
    "Accumulator": "layers.statistics",
    "Allocator": "backends",
    "Backend": "backends",
    "Codec": "formats",
    "CompressedModel": "compressed",
    "Container": "formats",
    "Grid": "layers.grids.base",
    "JointCompressor": "compressor",
    "LayerState": "layers.state",
    "Metric": "evaluation",
    "OptimumOrderConfig": "integrations.on_load",
    "OptimumOrderError": "errors",
    "Order": "order",
    "Recovery": "backends",
    "Reshaper": "backends",
    "Stage": "order",
    "Statistics": "layers.statistics",
    "Transform": "backends",
    "option": "backends",
}


@when_imported("transformers.quantizers.auto")
def _register(_module: ModuleType) -> None:
    """Have transformers load our own encodings, as soon as transformers knows about any."""
    try:
        import_module("optimum_order.models.quantizer")
    except ImportError as error:  # nobody's `import transformers` fails because of this package
        warnings.warn(
            f"optimum_order cannot register its encodings with this transformers: {error}. Those "
            "of its folders that need them do not load; upgrade transformers.",
            stacklevel=2,
        )


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"optimum_order.{_HOME[name]}"), name)
    raise AttributeError(f"module 'optimum_order' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
