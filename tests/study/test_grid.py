"""The orders of a study."""

import pytest

from optimum_order.errors import OrderError
from optimum_order.order import Order, Stage
from optimum_order.study.grid import draws_matter, grid, off_grid, with_parts

WANDA = [Stage("wanda")]
RTN = [Stage("rtn")]


def text(orders):
    return [str(order) for order in orders]


def test_grid_is_each_stage_alone_and_both_orders_of_every_pair():
    orders = text(grid([Stage("wanda"), Stage("magnitude")], [0.3, 0.5], RTN, [4, 3]))
    alone = ["wanda:0.3", "wanda:0.5", "magnitude:0.3", "magnitude:0.5", "rtn:4", "rtn:3"]
    assert orders[:6] == alone
    assert len(orders) == len(set(orders)) == 6 + 2 * 8
    assert "wanda:0.3 > rtn:4" in orders
    assert "rtn:4 > wanda:0.3" in orders


def test_grid_keeps_options_and_drops_repetitions():
    pruners = [Stage("sparsegpt", pattern="none"), Stage("sparsegpt")]
    orders = text(grid(pruners, [0.5, 0.5], [Stage("gptq", group_size=16)], [4, 3, 4]))
    assert len(orders) == 3 + 4
    assert "sparsegpt:0.5 > gptq(bits=4, group_size=16)" in orders


def test_simulated_grid_leaves_the_grid_and_changes_nothing_else():
    plain = text(grid(WANDA, [0.5], RTN, [4, 3]))
    simulated = text(grid(WANDA, [0.5], RTN, [4, 3], simulate=True))
    short = [
        order.replace("wanda(off_grid=true, sparsity=0.5)", "wanda:0.5") for order in simulated
    ]
    assert short == plain != simulated
    order = off_grid(Order.parse("rtn:4 > wanda(pattern=2:4)"))
    assert str(order) == "rtn:4 > wanda(off_grid=true, pattern=2:4)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WANDA, [0.5], RTN, [4]), "has 1 pairs, and a study compares at least 2"),
        ((WANDA, [0.5, 0.5], RTN, [4]), "has 1 pairs"),
        ((WANDA, [0.5], RTN, []), "has 0 pairs"),
        (([], [0.5], RTN, [4]), "has 0 pairs"),
        (([Stage("wanda", 0.5)], [0.5], RTN, [4, 3]), "'wanda:0.5' without its sparsity"),
        ((WANDA, [0.5], [Stage("rtn", bits=4)], [4, 3]), "without its bits"),
        ((WANDA, [1.5], RTN, [4, 3]), r"in \[0, 1\), got 1.5"),
        ((WANDA, [0.5], RTN, [4, 9]), "in 2..8, got 9"),
        (([Stage("gptq")], [0.5], RTN, [4, 3]), "Unknown option 'sparsity'"),
    ],
)
def test_grid_refuses_what_is_no_grid(arguments, message):
    with pytest.raises(OrderError, match=message):
        grid(*arguments)


def test_every_stage_is_also_run_alone():
    orders = [Order.parse("wanda:0.5 > rtn:4"), Order.parse("rtn:4 > wanda:0.5")]
    assert text(with_parts(orders)) == ["wanda:0.5", "rtn:4", *text(orders)]


def test_draws_matter_where_a_stage_calibrates():
    calibrated = ["wanda:0.5", "rtn:4 > gptq:4", "mixed_precision:4 > magnitude:0.5"]
    assert all(draws_matter(Order.parse(order)) for order in calibrated)
    assert not draws_matter(Order.parse("magnitude:0.5 > rtn:4 > bitsandbytes:nf4"))


def test_a_stage_that_makes_up_for_others_is_in_no_study():
    with pytest.raises(OrderError, match="'eora:8' makes up for stages before it"):
        with_parts([Order.parse("rtn:4 > eora:8")])
    assert text(with_parts([Order.parse("rtn:4 > lora:5")])) == [
        "rtn:4",
        "lora:5",
        "rtn:4 > lora:5",
    ]
