"""Statistics of the inputs of one layer. One statistic is one file."""

from optimum_order.layers.statistics.abs_max import AbsMax
from optimum_order.layers.statistics.base import Accumulator, Statistics
from optimum_order.layers.statistics.drift import Drift
from optimum_order.layers.statistics.expert_norms import ExpertNorms
from optimum_order.layers.statistics.gram import Gram
from optimum_order.layers.statistics.squared_norms import SquaredNorms

__all__ = ["AbsMax", "Accumulator", "Drift", "ExpertNorms", "Gram", "SquaredNorms", "Statistics"]
