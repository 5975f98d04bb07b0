"""The figures of benchmarks/paper.md are those that benchmarks/paper.py stored."""

import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STORED = json.loads((BENCHMARKS / "findings.json").read_text())
TEXT = (BENCHMARKS / "paper.md").read_text(encoding="utf-8")
CODE = re.compile(r"`(.+)`")
NUMBER = r"[+-]?\d+\.\d+"


def rows(study):
    """The cells of the table below the heading of a study."""
    (section,) = re.findall(rf"^## .*`(?:--run )?{study}`\)$(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("study", sorted(name for name in STORED if STORED[name]["pairs"]))
def test_pairs(study):
    stored = STORED[study]
    pairs = {(pair["first"], pair["second"]): pair for pair in stored["pairs"]}
    table = rows(study.removeprefix("tiny-llama-"))
    assert len(table) == len(pairs) > 5
    for first, second, forth, back, gain in table:
        first, second = (CODE.fullmatch(cell)[1] for cell in (first, second))
        rounding = 0.51 * 10.0 ** -len(forth.partition(".")[2])
        for shown, order in ((forth, f"{first} > {second}"), (back, f"{second} > {first}")):
            assert float(shown) == pytest.approx(stored["values"][order], abs=rounding)
        pair = pairs[first, second]
        expected = [-pair["mean"], -pair["high"], -pair["low"]]
        assert [float(n) for n in re.findall(NUMBER, gain)] == pytest.approx(expected, abs=6e-5)


def test_mixed_precision():
    stored = STORED["tiny-llama-mixed-precision"]
    gains = {one["order"]: one for one in stored["choices"]}
    table = rows("mixed-precision")
    assert len(table) == len(gains) == 3
    for order, weaker, stronger, gain in table:
        order = CODE.fullmatch(order)[1]
        values = [stored["values"][order], stored["values"][order.replace("weaker", "stronger")]]
        assert [float(weaker), float(stronger)] == pytest.approx(values, abs=0.0051)
        expected = [gains[order][key] for key in ("mean", "low", "high")]
        assert [float(n) for n in re.findall(NUMBER, gain)] == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize(("study", "orders"), [("four-stages", 24), ("five-stages", 40)])
def test_neighbors_that_change_places(study, orders):
    stored = STORED[f"tiny-llama-{study}"]
    gains = {(one["first"], one["second"]): one for one in stored["swaps"]}
    (ranking,) = stored["rankings"]
    table = rows(study)
    assert len(ranking) == orders and len(table) == len(gains) > 5
    for first, second, better, gain in table:
        one = gains[CODE.fullmatch(first)[1], CODE.fullmatch(second)[1]]
        assert better == f"{one['better']} of {one['swaps']}"
        expected = [one[key] for key in ("mean", "low", "high")]
        assert [float(n) for n in re.findall(NUMBER, gain)] == pytest.approx(expected, abs=6e-5)
    section = TEXT.split(f"(`--run {study}`)")[1].partition("| first |")[0]
    for row in (ranking[0], ranking[-1]):
        assert f"{stored['values'][row['order']]:.2f}" in section


def test_rotation():
    stored = STORED["tiny-llama-rotation"]
    rotate, quantizer = "rotate(force=true)", "gptq(bits=4, group_size=-1)"
    table = rows("rotation")
    assert len(table) == 4
    for pruner, before, between, last, gap in table:
        pruner = CODE.fullmatch(pruner)[1]
        places = [
            (pruner, rotate, quantizer),
            (rotate, pruner, quantizer),
            (rotate, quantizer, pruner),
        ]
        orders = [" > ".join(stages) for stages in places]
        values = [stored["values"][order] for order in orders]
        shown = [float(cell) for cell in (before, between, last)]
        assert shown == pytest.approx(values, abs=0.0051)
        (ranking,) = [r for r in stored["rankings"] if {row["order"] for row in r} == set(orders)]
        worst = ranking[-1]
        expected = [-worst["mean"], -worst["high"], -worst["low"]]
        assert [float(n) for n in re.findall(NUMBER, gap)] == pytest.approx(expected, abs=6e-5)
