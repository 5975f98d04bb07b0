"""The passes of a run: each verb of the engine is one loop over the blocks of the model."""

from optimum_order.engine.passes.compress import Compressing
from optimum_order.engine.passes.cut import Cutting
from optimum_order.engine.passes.learn import Recovering
from optimum_order.engine.passes.look import Looking
from optimum_order.engine.passes.rewrite import Rewriting

__all__ = ["Passes"]


class Passes(Compressing, Looking, Cutting, Rewriting, Recovering):
    """Carries methods out on a model: the `Engine` of `backends.base`."""
