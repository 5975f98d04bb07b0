"""Weaker first, stronger later."""

from optimum_order.search.strategies import pih


def test_the_weaker_stage_is_first(make_task):
    task = make_task(["magnitude:0.6", "rtn:8", "rtn:3"])
    verdict = pih.rank(task)
    assert str(verdict.ranking[0][0]) == "rtn:8 > rtn:3 > magnitude:0.6"
    assert str(verdict.ranking[-1][0]) == "magnitude:0.6 > rtn:3 > rtn:8"
    assert sorted(score for _, score in verdict.ranking) == [0, 1, 1, 2, 2, 3]
    assert "'rtn:8' costs the least and 'magnitude:0.6' the most" in verdict.reason
    assert task.cost["orders"] == 3
