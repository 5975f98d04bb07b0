"""Pictures of a study: that what stands in them are its numbers, where they belong."""

import io
import random

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from optimum_order.study import plots


def pair(first, second, mean, decisive):
    return {"first": first, "second": second, "advantage": {"mean": mean, "decisive": decisive}}


def mapped(pairs, rows, columns, factor=1.0):
    """The axes of a map."""
    figure = Figure()
    ax = figure.subplots()
    summary = {"measure": {"factor": factor, "difference": "log-perplexity"}}
    plots._map(figure, ax, summary, pairs, rows, columns)
    return ax


def test_each_cell_of_a_map_has_its_own_number_in_brackets_unless_it_is_decisive():
    rows, columns = ["wanda:0.3", "wanda:0.5"], ["rtn:2", "rtn:4"]
    pairs = [pair("wanda:0.5", "rtn:2", -0.25, True), pair("wanda:0.3", "rtn:4", 0.012, False)]
    ax = mapped(pairs, rows, columns, factor=100.0)
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0, 1): "−25",
        (1, 0): "(+1.2)",
    }
    shown = ax.images[0].get_array().filled(np.nan)
    assert (
        shown[1, 0] == -25
        and shown[0, 1] == pytest.approx(1.2)
        and np.isnan(shown[0, 0])
        and np.isnan(shown[1, 1])
    )
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0.3", "0.5"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rtn", "wanda")


def test_both_signs_are_as_far_from_the_middle_of_the_colours():
    ax = mapped([pair("wanda:0.3", "rtn:4", 0.5, True)], ["wanda:0.3"], ["rtn:4"])
    assert ax.images[0].get_clim() == (-0.5, 0.5)


def test_a_map_with_many_cells_has_colours_only_and_no_crowd_of_labels():
    rows, columns = [f"wanda:{0.01 * i:.2f}" for i in range(1, 41)], ["rtn:4"]
    ax = mapped([pair(row, "rtn:4", 0.1, True) for row in rows], rows, columns)
    assert not ax.texts
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert len(labels) == 40 and 0 < sum(map(bool, labels)) <= 12


def test_a_scale_is_logarithmic_only_where_sizes_differ_much():
    assert plots._wide([0.1, -0.2, 0.3, 0.0]) is None
    assert 0.001 <= plots._wide([0.001, -0.002, 0.002, 4.0]) <= 0.002


def test_numbers_are_signed_and_ordered_as_people_do():
    assert [plots.signed(value) for value in (0.0123, -0.5, 0.0, -12.3)] == [
        "+0.012",
        "−0.5",
        "0",
        "−12",
    ]
    names = ["wanda:0.5", "wanda:0.65", "rtn:16", "rtn:8", "wanda:0.05"]
    random.Random(0).shuffle(names)
    wanted = ["rtn:8", "rtn:16", "wanda:0.05", "wanda:0.5", "wanda:0.65"]
    assert sorted(names, key=plots._natural) == wanted


def test_a_picture_is_a_png_that_is_the_same_every_time():
    drawn = [plots._png(2.0, lambda figure, ax: ax.plot([0, 1], [0, 1])) for _ in range(2)]
    assert drawn[0] == drawn[1]
    with Image.open(io.BytesIO(drawn[0])) as image:
        assert image.format == "PNG" and "Software" not in image.info
