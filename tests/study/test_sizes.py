"""Quality against bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order.study.sizes import front, smallest


def around(*means, spread=0.001):
    """A row of two samples for each draw, of these means."""
    return [[mean - spread, mean + spread] for mean in means]


points = st.dictionaries(
    st.text(max_size=3), st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12
)


@settings(deadline=None)
@given(points)
def test_a_front_is_what_nothing_beats(points):
    names = front(points)

    def beats(a, b):
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    best = {
        name
        for name, point in points.items()
        if not any(beats(other, point) for other in points.values())
    }
    assert set(names) <= best
    assert {points[name] for name in names} == {points[name] for name in best}
    sizes = [points[name] for name in names]
    assert sizes == sorted(set(sizes))


def test_the_smallest_format_of_a_family():
    sizes = {"dense": 1000, "compressed-tensors": 400, "sparse": 300}
    assert smallest(sizes, "stock") == 400
    assert smallest(sizes, "any") == 300
    assert smallest({"sparse": 300}, "stock") is smallest(None, "any") is None


def sized(**changes):
    """Bytes of `JOINT` by format."""
    sizes = {
        "original": {"dense": 1000},
        "rtn:2": {"compressed-tensors": 200},
        "rtn:4": {"compressed-tensors": 400},
        "wanda:0.5": {"dense": 1000, "sparse": 500},
        "wanda:0.5 > rtn:4": {"compressed-tensors": 400, "sparse": 300},
        "rtn:4 > wanda:0.5": {"compressed-tensors": 400, "sparse": 310},
    }
    return {order: {"bytes": formats} for order, formats in (sizes | changes).items()}


JOINT = {
    "original": [-3.0, -3.1],
    "rtn:2": [-5.1, -5.0],
    "rtn:4": [-3.3, -3.2],
    "wanda:0.5": around(-3.4, -3.41, -3.42),
    "wanda:0.5 > rtn:4": around(-3.5, -3.51, -3.52, spread=0.05),
    "rtn:4 > wanda:0.5": around(-4.8, -4.81, -4.82, spread=0.05),
}


def test_combining_pays_only_where_it_beats_the_line_between_single_methods(make_summary):
    summary = make_summary(JOINT, more=sized())
    stock = summary["combining"]["stock"]
    # 400 bytes in a stock format, as rtn:4 alone, and worse
    assert (stock["joint"], stock["comparable"]) == (2, 2)
    assert (stock["decisively_worse"], stock["better"]) == (2, 0)
    assert stock["on_front"] == 0
    assert stock["front"] == ["rtn:2", "rtn:4", "original"]
    # 300 bytes in ours: half-way from rtn:2 to rtn:4, where the line's M is -4.15
    every = summary["combining"]["any"]
    assert every["comparable"] == 2
    assert every["better"] == every["decisively_better"] == 1
    best = every["best"]
    assert (best["order"], best["bytes"]) == ("wanda:0.5 > rtn:4", 300)
    assert best["alone"] == ["rtn:2", "rtn:4"]
    assert best["gain"]["mean"] == pytest.approx(-3.51 + 4.15)
    assert best["gain"]["over"] == "draws and samples"
    assert every["front"] == ["rtn:2", "wanda:0.5 > rtn:4", "rtn:4", "original"]
    fronts = {entry["order"]: entry["pareto"] for entry in summary["orders"]}
    assert fronts["wanda:0.5 > rtn:4"] == {"stock": False, "any": True}
    assert fronts["rtn:4"] == {"stock": True, "any": True}
    assert fronts["wanda:0.5"] == {"stock": False, "any": False}


def test_a_joint_model_smaller_than_all_others_is_compared_with_none(make_summary):
    small = {"wanda:0.5 > rtn:4": {"sparse": 100}}
    figures = make_summary(JOINT, more=sized(**small))["combining"]["any"]
    assert figures["comparable"] == 1
    assert figures["front"][0] == "wanda:0.5 > rtn:4"
