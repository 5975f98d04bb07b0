"""Joint model compression: prune and quantise a model, in the order that hurts it least."""

from importlib import import_module
from typing import TYPE_CHECKING

from wrapt import when_imported

__version__ = "0.2.0.dev0"

__all__ = [
    "Backend",
    "Codec",
    "CompressedModel",
    "Container",
    "JointCompressor",
    "LayerState",
    "OptimumOrderError",
    "Order",
    "Stage",
]

if TYPE_CHECKING:
    from optimum_order.backends import Backend
    from optimum_order.compressed import CompressedModel
    from optimum_order.compressor import JointCompressor
    from optimum_order.errors import OptimumOrderError
    from optimum_order.formats import Codec, Container
    from optimum_order.layers.state import LayerState
    from optimum_order.order import Order, Stage

# Where each public name lives. Nothing is imported before it is asked for: `import optimum_order` stays fast.
_HOME = {
    "Backend": "backends",
    "Codec": "formats",
    "CompressedModel": "compressed",
    "Container": "formats",
    "JointCompressor": "compressor",
    "LayerState": "layers.state",
    "OptimumOrderError": "errors",
    "Order": "order",
    "Stage": "order",
}


@when_imported("transformers.modeling_utils")
def _register(_module):
    """Have transformers load `sparse` checkpoints, as soon as it can load any; nothing heavy is imported before."""
    import_module("optimum_order.formats.transformers_hook")


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f"optimum_order.{_HOME[name]}"), name)
    raise AttributeError(f"module 'optimum_order' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
