"""Pictures of a study: their numbers are those of the summary, where they belong."""

import io
import random

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from optimum_order.study import plots


def pair(first, second, mean, decisive):
    return {"first": first, "second": second, "advantage": {"mean": mean, "decisive": decisive}}


def draw_map(pairs, rows, columns, factor=1.0, others=()):
    """Return the axes of a map."""
    figure = Figure()
    ax = figure.subplots()
    measure = {"factor": factor, "difference": "log-perplexity"}
    summary = {"measure": measure, "pairs": [*pairs, *others]}
    plots._map(figure, ax, summary, pairs, rows, columns)
    return ax


def test_each_cell_of_a_map_has_its_number_and_a_color_where_it_is_decisive():
    rows = ["wanda:0.3", "wanda:0.5"]
    columns = ["rtn:2", "rtn:4"]
    pairs = [pair("wanda:0.5", "rtn:2", -0.25, True), pair("wanda:0.3", "rtn:4", 0.012, False)]
    ax = draw_map(pairs, rows, columns, factor=100.0)
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts == {(0, 1): "−25", (1, 0): "+1.2"}
    colors = ax.images[0].get_array().filled(np.nan)
    assert colors[1, 0] == -25
    assert np.isnan(colors[[0, 1, 0], [0, 1, 1]]).all()
    (hatched,) = ax.patches
    assert hatched.get_hatch() and hatched.get_xy() == (0.5, -0.5)
    assert len(ax.figure.axes) == 2, "a bar of colors"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0.3", "0.5"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rtn", "wanda")


def test_the_bar_of_a_map_has_plain_numbers():
    columns = ["rtn:2", "rtn:3", "rtn:4", "rtn:8"]
    means = (0.001, -0.002, 0.003, -2.0)
    pairs = [
        pair("wanda:0.3", column, mean, True) for column, mean in zip(columns, means, strict=True)
    ]
    with matplotlib.rc_context(plots._STYLE):
        figure = draw_map(pairs, ["wanda:0.3"], columns).figure
        figure.draw_without_rendering()
        labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert {"0", "−1", "−0.01"} <= set(labels)
    assert not any("$" in label for label in labels)


def test_both_signs_are_as_far_from_the_middle_of_the_colors():
    pairs = [pair("wanda:0.3", "rtn:4", 0.5, True)]
    ax = draw_map(pairs, ["wanda:0.3"], ["rtn:4"])
    assert ax.images[0].get_clim() == (-0.5, 0.5)
    others = [pair("sparsegpt:0.3", "rtn:4", -0.7, True)]
    ax = draw_map(pairs, ["wanda:0.3"], ["rtn:4"], others=others)
    assert ax.images[0].get_clim() == (-0.7, 0.7), "one scale for the maps of all methods"


def test_a_map_with_many_cells_has_colors_only_and_no_crowd_of_labels():
    rows = [f"wanda:{0.01 * i:.2f}" for i in range(1, 41)]
    ax = draw_map([pair(row, "rtn:4", 0.1, True) for row in rows], rows, ["rtn:4"])
    assert not ax.texts
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert len(labels) == 40
    assert 0 < sum(map(bool, labels)) <= 12


def test_a_scale_is_logarithmic_only_where_sizes_differ_much():
    assert plots._linear_part([0.1, -0.2, 0.3, 0.0]) is None
    assert 0.001 <= plots._linear_part([0.001, -0.002, 0.002, 4.0]) <= 0.002


def test_numbers_are_signed_and_ordered_as_people_do():
    numbers = [plots.signed(value) for value in (0.0123, 0.04, -0.5, 0.0, -9.96, -12.3, 340.0)]
    assert numbers == ["+0.012", "+0.040", "−0.50", "0", "−10", "−12", "+340"]
    names = ["wanda:0.5", "wanda:0.65", "rtn:16", "rtn:8", "wanda:0.05"]
    random.Random(0).shuffle(names)
    expected = ["rtn:8", "rtn:16", "wanda:0.05", "wanda:0.5", "wanda:0.65"]
    assert sorted(names, key=plots._natural) == expected


def test_long_lists_are_cut_into_similar_parts():
    parts = plots._parts(list(range(40)), 18)
    assert [(name, len(items)) for name, items in parts] == [
        (", part 1", 12),
        (", part 2", 14),
        (", part 3", 14),
    ]
    assert plots._parts([1, 2], 18) == [("", [1, 2])]
    assert plots._parts([], 18) == []


def test_models_are_of_the_kind_that_their_stages_make_them():
    alone = {"wanda:0.5": "prune", "rtn:4": "quantize"}

    def kind(*stages, kind="joint"):
        return plots._kind({"kind": kind, "stages": stages}, alone)

    assert kind("wanda:0.5", kind="prune") == "only pruned"
    assert kind("rtn:4", "rtn:3", kind="quantize") == "only quantized"
    assert kind("wanda:0.5", "rtn:4") == "pruned first"
    assert kind("rtn:4", "wanda:0.5") == "quantized first"
    assert kind("rtn:4", "wanda:0.5", "rtn:3") == "both, in turns"


def test_a_picture_is_a_png_that_is_the_same_every_time():
    with matplotlib.rc_context(plots._STYLE):
        drawn = [plots._image(2.0, lambda figure, ax: ax.plot([0, 1], [0, 1])) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert b"<svg" in drawn[0].svg and b"dc:date" not in drawn[0].svg
    with Image.open(io.BytesIO(drawn[0].png)) as image:
        assert image.format == "PNG"
        assert "Software" not in image.info


def test_labels_overlap_neither_labels_nor_points_and_stay_inside():
    figure = Figure()
    ax = figure.subplots()
    points = [(0, 0), (1, 1), (0.5, 0.5), (0.62, 0.52)]
    ax.plot(*zip(*points, strict=True), "o")
    labels = [(0.5, 0.5, f"model {number} > gptq:4") for number in range(9)] + [(1, 1, "corner")]
    plots._write_labels(figure, ax, labels, points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in ax.texts]
    assert 3 <= len(boxes) < 10, "as many as there is room for"
    frame = ax.get_window_extent(renderer)
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert not any(box.contains(*ax.transData.transform(point)) for point in points)
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
    assert ax.texts[-1].get_text() == "corner"


@pytest.mark.parametrize("most", [1.2, 400.0])
def test_perplexity_has_a_logarithmic_axis_with_plain_numbers(most):
    figure = Figure()
    ax = figure.subplots()
    ax.plot([0, 1], [20.0, 20 * most])
    plots._log_axis(ax)
    FigureCanvasAgg(figure).draw()
    assert ax.get_yscale() == "log"
    low, high = ax.get_ylim()
    ticks = [tick for tick in ax.get_yticks() if low <= tick <= high]
    labels = [ax.yaxis.get_major_formatter()(tick) for tick in ticks]
    assert len(ticks) >= 3
    assert [float(label) for label in labels] == pytest.approx(ticks)
