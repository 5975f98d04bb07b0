"""The types of text arguments say what the code takes, and what the command line lists."""

from typing import get_args

from optimum_order.calibration.execution import PAUSES
from optimum_order.cli import arguments
from optimum_order.engine import choices
from optimum_order.engine.recipe import EMBEDDINGS, SCHEDULES
from optimum_order.models import precision
from optimum_order.search.planner import STRATEGIES


def test_the_types_are_what_the_code_takes():
    for choice, code, listed in [
        (choices.Pause, ("auto", *PAUSES), arguments.PAUSES),
        (choices.Schedule, SCHEDULES, arguments.SCHEDULES),
        (choices.Embeddings, EMBEDDINGS, arguments.EMBEDDINGS),
        (choices.CalibrationDType, ("auto", *precision.DTYPES), arguments.CALIBRATION_DTYPES),
        (choices.Strategy, STRATEGIES, arguments.STRATEGIES),
        (choices.DType, arguments.DTYPES, arguments.DTYPES),
    ]:
        assert set(get_args(choice)) == set(code) == set(listed)
