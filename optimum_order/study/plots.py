"""The pictures of a report, drawn from its summary: small, so that a telephone shows them too.

Each is a PNG and an SVG, and comes with its numbers.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from optimum_order.errors import missing_extra
from optimum_order.order import Stage
from optimum_order.study.pairs import has_intensity
from optimum_order.study.sizes import smallest
from optimum_order.study.trials import ORIGINAL

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize, SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import (
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullLocator,
        SymmetricalLogLocator,
    )
    from matplotlib.transforms import Bbox
except ImportError as error:
    raise missing_extra("study", error) from error

_WIDTH = 4.5  # inches, of which a narrow screen shows about 80 pixels each
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "hatch.linewidth": 0.6,
    "savefig.dpi": 180,
    "svg.hashsalt": "optimum-order",  # the same picture gives the same file
    "text.parse_math": False,
}
# Of Okabe and Ito, whose colors the color-blind can tell apart.
_BLUE = "#0072B2"
_ORANGE = "#D55E00"
_GREEN = "#009E73"
_PINK = "#CC79A7"
_GREY = "#777777"
_SIGNS = "PuOr_r"
"""Colors of an advantage: orange where positive, violet where negative."""
_MOST_NUMBERS = 10
"""Rows or columns of a map up to which each cell has room for its number."""
_LETTERS = 56
"""Letters of small type in the width of a picture."""
_FEWEST = 5
"""Pairs below which a panel would show no pattern: the tables show these."""
_MOST_LABELS = 8

Summary = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]
_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Image:
    """A drawing as files.

    Args:
        png: For screens.
        svg: For print, sharp at every size.
    """

    png: bytes
    svg: bytes


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        section: The section of the report.
        name: The name of the file, without ending.
        title: What the picture shows.
        caption: What is particular about it, or "".
        image: What is drawn.
        rows: The numbers that it shows.
    """

    section: str
    name: str
    title: str
    caption: str
    image: Image
    rows: Rows

    def files(self) -> dict[str, bytes]:
        """Return the contents of its files by name."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in self.rows for key in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        contents = {"png": self.image.png, "svg": self.image.svg, "csv": text.getvalue().encode()}
        return {f"{self.name}.{ending}": content for ending, content in contents.items()}


def draw(summary: Summary) -> list[Picture]:
    """Draw every picture for which there are numbers.

    Args:
        summary: From `analysis.summarize`.
    """
    artists = (_intensities, _maps, _sizes, _splits, _correlations, _rankings)
    with matplotlib.rc_context(_STYLE):
        return [picture for artist in artists for picture in artist(summary)]


def signed(value: float) -> str:
    """Return a difference to two digits: +0.012, +0.040."""
    if not value:
        return "0"
    digits = f"{value:+.0f}" if abs(value) >= 9.95 else f"{value:+#.2g}"
    return digits.replace("-", "−")


def group_name(group: Mapping[str, Any]) -> str:
    """Return a pair of methods as a title."""
    return " × ".join(group["methods"]) + (", off the grid" if group["simulated"] else "")


def _image(height: float, draw: Callable[..., None], *arguments: Any) -> Image:
    """Return what `draw(figure, ax, *arguments)` draws."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    draw(figure, figure.subplots(), *arguments)
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Creator": None, "Date": None})
    return Image(png.getvalue(), svg.getvalue())


def _write_labels(
    figure: Figure,
    ax: Axes,
    labels: Sequence[tuple[float, float, str]],
    points: Sequence[tuple[float, float]],
) -> None:
    """Write beside points what they are, as far as there is room.

    Labels overlap neither each other nor points.

    Args:
        figure: The figure.
        ax: Its axes, with everything else drawn.
        labels: x, y and the text of each point, the most important first.
        points: x and y of every point that is drawn.
    """
    figure.draw_without_rendering()  # the layout decides where there is room
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame = ax.get_window_extent(renderer)
    pixel = figure.dpi / 72
    centers = [ax.transData.transform(point) for point in points]
    taken = [Bbox([center - 2.5 * pixel, center + 2.5 * pixel]) for center in centers]
    right_sides = [(6, 4, "left"), (6, -10, "left")]
    left_sides = [(-6, 4, "right"), (-6, -10, "right")]
    sides = [*right_sides, *left_sides, (0, 9, "center"), (0, -15, "center")]
    for x, y, text in labels:
        for right, up, align in sides:
            label = ax.annotate(
                text,
                (x, y),
                (right, up),
                textcoords="offset points",
                ha=align,
                fontsize=7.5,
                zorder=1.9,
            )
            label.set_path_effects([withStroke(linewidth=2, foreground="white")])
            label.set_in_layout(False)
            text_box = label.get_window_extent(renderer)
            box = Bbox.from_extents(
                text_box.x0 - 3 * pixel, text_box.y0, text_box.x1 + 3 * pixel, text_box.y1
            )
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1
            inside = inside and box.y0 >= frame.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _pair_rows(summary: Summary, pairs: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the advantage of pairs, as the picture shows it."""
    factor = summary["measure"]["factor"]
    return [
        {
            "first": pair["first"],
            "second": pair["second"],
            "advantage": factor * pair["advantage"]["mean"],
            "low": factor * pair["advantage"]["low"],
            "high": factor * pair["advantage"]["high"],
            "decisive": pair["advantage"]["decisive"],
        }
        for pair in pairs
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _members(summary: Summary, group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the pairs of a group."""
    key = (list(group["methods"]), group["simulated"])
    return [pair for pair in summary["pairs"] if (list(pair["methods"]), pair["simulated"]) == key]


def _linear_part(values: Sequence[float]) -> float | None:
    """Return the linear part of a logarithmic scale, or None where values are of similar size."""
    sizes = np.abs([value for value in values if value])
    if len(sizes) > 2 and sizes.max() > 20 * np.median(sizes):
        return float(np.quantile(sizes, 0.25))
    return None


def _symlog(ax: Axes, linear: float) -> None:
    ax.set_yscale("symlog", linthresh=linear)
    locator: Any = SymmetricalLogLocator(base=10, linthresh=linear)
    locator.set_params(numticks=7)
    ax.yaxis.set_major_locator(locator)
    ax.yaxis.set_major_formatter(_plain())


def _plain() -> FuncFormatter:
    """Return a format of ticks as plain numbers, with a minus sign."""
    return FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−"))


# --- A against intensity ---------------------------------------------------------------------


def _intensities(summary: Summary) -> Iterator[Picture]:
    groups = [
        (group_name(group), _slug(group_name(group)), group, _members(summary, group))
        for group in summary["methods"]
    ]
    if len(groups) > 1:
        groups.insert(0, ("all pairs", "all", summary["all"], summary["pairs"]))
    for title, slug, figures, members in groups:
        pairs = [pair for pair in members if has_intensity(pair)]
        if len(pairs) < _FEWEST:
            continue
        rho = figures["spearman"]
        text = "Spearman's rho: "
        text += "not defined" if rho["rho"] is None else f"{rho['rho']:+.2f}"
        if rho["low"] is not None:
            text += f" [{rho['low']:+.2f}, {rho['high']:+.2f}]"
        text = text.replace("-", "−")
        bounds = f"; x is only a bound in {rho['bounds']} of them." if rho["bounds"] else "."
        caption = f"{text}, over {rho['pairs']} pairs{bounds}"
        image = _image(3.5, _intensity, summary, pairs, text)
        rows = [
            {**row, "x": pair["intensity"]["value"], "bound": pair["intensity"]["bound"]}
            for row, pair in zip(_pair_rows(summary, pairs), pairs, strict=True)
        ]
        yield Picture("intensity", f"intensity-{slug}", title, caption, image, rows)


def _intensity(
    figure: Figure, ax: Axes, summary: Summary, pairs: Sequence[Mapping[str, Any]], text: str
) -> None:
    factor = summary["measure"]["factor"]
    values = [factor * pair["advantage"]["mean"] for pair in pairs]
    if linear := _linear_part(values):
        _symlog(ax, linear)
    for pair, value in zip(pairs, values, strict=True):
        x = pair["intensity"]["value"]
        advantage = pair["advantage"]
        color = _ORANGE if value > 0 else _BLUE
        ends = [factor * advantage[end] for end in ("low", "high")]
        ax.plot([x, x], ends, color=color, lw=0.8, alpha=0.5)
        marker = {"exact": "o", "at least": ">", "at most": "<"}[pair["intensity"]["bound"]]
        fill = color if advantage["decisive"] else "white"
        ax.plot(x, value, marker, color=color, mfc=fill, ms=5.5, zorder=3)
    low, high = ax.get_xlim()
    edge = 1.05 * max(abs(low), abs(high), 0.01)
    ax.set_xlim(-edge, edge)
    top = max(map(abs, ax.get_ylim()))
    ax.set_ylim(-top, top)
    for x, y in ((0, 0), (-edge, -top)):  # where pairs lie by the hypothesis
        ax.fill_between([x, x + edge], y, y + top, color="#e9efe6", zorder=0, lw=0)
    ax.axhline(0, color=_GREY, lw=0.8)
    ax.axvline(0, color=_GREY, lw=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.set_xlabel("x = C*P − C*Q   (right: pruning is the stronger)")
    ax.set_ylabel(f"A(Q → P), {summary['measure']['difference']}")
    ax.set_title(text, fontsize=9, loc="left")
    order = sorted(range(len(pairs)), key=lambda index: -abs(values[index]))[:_MOST_LABELS]
    names = [f"{pairs[index]['first']}, {pairs[index]['second']}" for index in order]
    shown = [textwrap.shorten(name, 26, placeholder="…") for name in names]
    places = [(pairs[index]["intensity"]["value"], values[index]) for index in order]
    labels = [(x, y, name) for (x, y), name in zip(places, shown, strict=True)]
    points = [
        (pair["intensity"]["value"], value) for pair, value in zip(pairs, values, strict=True)
    ]
    _write_labels(figure, ax, labels, points)


# --- map of advantages -----------------------------------------------------------------------


def _maps(summary: Summary) -> Iterator[Picture]:
    for group in summary["methods"]:
        pairs = _members(summary, group)
        rows, columns = (
            sorted(dict.fromkeys(pair[end] for pair in pairs), key=_natural)
            for end in ("first", "second")
        )
        if len(pairs) >= _FEWEST and len(rows) * len(columns) <= 3 * len(pairs):
            image = _image(1.3 + 0.42 * min(len(rows), 12), _map, summary, pairs, rows, columns)
            caption = "Here orange means that the stage below is better first, violet the other."
            if all(pair["prunes_and_quantizes"] for pair in pairs):
                caption = ""
            title = group_name(group)
            data = _pair_rows(summary, pairs)
            yield Picture("map", f"map-{_slug(title)}", title, caption, image, data)


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Return a sort key by which 0.5 comes before 0.65 and 8 before 16."""
    return [
        (0, float(part), "") if re.fullmatch(r"[0-9]*\.?[0-9]+", part) else (1, 0.0, part)
        for part in re.split(r"([0-9]*\.?[0-9]+)", text)
        if part
    ]


def _knob(stage: str) -> str:
    value = Stage.parse(stage).value
    return stage if value is None else str(value)


def _shared_scale(summary: Summary) -> Normalize:
    """Return the scale of colors of every map, so that two maps can be compared."""
    factor = summary["measure"]["factor"]
    sizes = [abs(factor * pair["advantage"]["mean"]) for pair in summary["pairs"]]
    most = max(sizes) or 1.0
    linear = _linear_part(sizes)
    return SymLogNorm(linear, vmin=-most, vmax=most) if linear else Normalize(-most, most)


def _map(
    figure: Figure,
    ax: Axes,
    summary: Summary,
    pairs: Sequence[Mapping[str, Any]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> None:
    factor = summary["measure"]["factor"]
    grid = np.full((len(rows), len(columns)), np.nan)
    decisive = np.zeros(grid.shape, bool)
    for pair in pairs:
        cell = rows.index(pair["first"]), columns.index(pair["second"])
        grid[cell] = factor * pair["advantage"]["mean"]
        decisive[cell] = pair["advantage"]["decisive"]
    norm = _shared_scale(summary)
    image = ax.imshow(np.where(decisive, grid, np.nan), cmap=_SIGNS, norm=norm, aspect="auto")
    for row, column in np.argwhere(np.isfinite(grid) & ~decisive):
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, hatch="////", fc="#f2f2f2", ec="#c4c4c4", lw=0))
    if max(grid.shape) <= _MOST_NUMBERS:
        for row, column in np.argwhere(np.isfinite(grid)):
            dark = abs(float(norm(grid[row, column])) - 0.5) > 0.32 and decisive[row, column]
            _write_cell(ax, row, column, signed(grid[row, column]), dark=dark, fontsize=8.5)
    _color_bar(figure, ax, image)
    ax.set_xticks(range(len(columns)), _thinned([_knob(stage) for stage in columns]))
    ax.set_yticks(range(len(rows)), _thinned([_knob(stage) for stage in rows]))
    ax.set_xlabel(Stage.parse(columns[0]).method)
    ax.set_ylabel(Stage.parse(rows[0]).method)
    ax.set_title(f"A, {summary['measure']['difference']}", fontsize=9, loc="left")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def _write_cell(ax: Axes, row: int, column: int, text: str, *, dark: bool, fontsize: float) -> None:
    """Write into a cell of a map, in white on a dark color."""
    color = "white" if dark else "black"
    ax.text(column, row, text, ha="center", va="center", fontsize=fontsize, color=color)


def _color_bar(figure: Figure, ax: Axes, image: Any, **options: Any) -> None:
    outline: Any = figure.colorbar(image, ax=ax, format=_plain(), **options).outline
    outline.set_visible(False)


def _thinned(labels: Sequence[str]) -> list[str]:
    """Blank all but a dozen of the labels, and shorten them so that the picture has room."""
    step = -(-len(labels) // 12)
    return [
        textwrap.shorten(label, 18, placeholder="…") if i % step == 0 else ""
        for i, label in enumerate(labels)
    ]


# --- quality against bytes -------------------------------------------------------------------

_KINDS = {
    "only pruned": ("s", _GREEN),
    "only quantized": ("o", _BLUE),
    "pruned first": ("^", _ORANGE),
    "quantized first": ("v", _PINK),
    "both, in turns": ("D", "#E69F00"),
    "neither": ("P", _GREY),
    "original": ("*", "black"),
}

_FAMILIES = {
    "stock": "Formats that stock transformers loads",
    "any": "The smallest format, 'sparse' included",
}


@dataclasses.dataclass(frozen=True)
class _Point:
    size: int
    performance: float
    kind: str
    name: str


def _kind(entry: Mapping[str, Any], alone: Mapping[str, str]) -> str:
    """Return one of `_KINDS`.

    Args:
        entry: The figures of an order.
        alone: The kind of each stage.
    """
    if entry["kind"] != "joint":
        names = {"prune": "only pruned", "quantize": "only quantized"}
        return names.get(entry["kind"], "neither")
    if len(entry["stages"]) > 2:
        return "both, in turns"
    return "pruned first" if alone[entry["stages"][0]] == "prune" else "quantized first"


def _points(summary: Summary, family: str) -> Iterator[_Point]:
    alone = {
        entry["order"]: entry["kind"] for entry in summary["orders"] if len(entry["stages"]) == 1
    }
    original = summary["original"] | {"order": ORIGINAL}
    for entry in [*summary["orders"], original]:
        size = smallest(entry["bytes"], family)
        if size is not None and entry["performance"] is not None:
            kind = "original" if entry is original else _kind(entry, alone)
            yield _Point(size, entry["performance"], kind, entry["order"])


def _sizes(summary: Summary) -> Iterator[Picture]:
    sparse = any("sparse" in (entry["bytes"] or {}) for entry in summary["orders"])
    for family, title in _FAMILIES.items():
        points = list(_points(summary, family))
        if len(points) < 3 or (family == "any" and not sparse):
            continue
        models = {point.name: point for point in points}
        front = [models[name] for name in summary["combining"][family]["front"]]
        lowest = min(point.performance for point in front)
        span = max(point.performance for point in front) - lowest or 1.0
        floor = lowest - 0.15 * span
        below = sum(point.performance < floor for point in points)
        caption = f"{below} models that are much worse lie outside the picture." if below else ""
        image = _image(4.0, _size, summary, points, front, floor)
        rows = [
            {
                "order": point.name,
                "kind": point.kind,
                "bytes": point.size,
                "shown": _shown(summary, point),
                "front": point in front,
            }
            for point in points
        ]
        yield Picture("bytes", f"bytes-{family}", title, caption, image, rows)


def _shown(summary: Summary, point: _Point) -> float:
    """Return what the picture shows of a model: the perplexity of one that has one, else M."""
    if summary["measure"]["metric"] == "perplexity":
        return math.exp(-point.performance)
    return float(summary["measure"]["factor"] * point.performance)


def _size(
    figure: Figure,
    ax: Axes,
    summary: Summary,
    points: Sequence[_Point],
    front: Sequence[_Point],
    floor: float,
) -> None:
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
    unit, name = next((unit, name) for unit, name in units if points[0].size >= unit or unit == 1)
    ax.plot(
        [point.size / unit for point in front],
        [_shown(summary, point) for point in front],
        color=_GREY,
        lw=1.2,
        zorder=1,
    )
    for kind, (marker, color) in _KINDS.items():
        shown = [point for point in points if point.kind == kind and point.performance >= floor]
        if shown:
            ax.scatter(
                [point.size / unit for point in shown],
                [_shown(summary, point) for point in shown],
                90 if kind == "original" else 26,
                color=color,
                marker=marker,
                label=kind,
                alpha=0.8,
                lw=0,
                zorder=2,
            )
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.set_xlabel(f"weights on disk, {name}")
    ax.grid(color="#eeeeee")
    if summary["measure"]["metric"] == "perplexity":
        _log_axis(ax)
        ax.set_ylabel("perplexity, logarithmic: lower is better")
    else:
        ax.set_ylabel(f"M: {summary['measure']['performance']}")
    _legend(figure, ncols=3, handletextpad=0.3, columnspacing=1)
    labels = [
        (point.size / unit, _shown(summary, point), textwrap.shorten(arrows(point.name), 30))
        for point in front
        if point.performance >= floor
    ]
    places = [
        (point.size / unit, _shown(summary, point))
        for point in points
        if point.performance >= floor
    ]
    _write_labels(figure, ax, labels[:_MOST_LABELS], places)


def _log_axis(ax: Axes) -> None:
    """Make the axis of y logarithmic, with plain numbers however narrow its range."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    few: Any = MaxNLocator(6, steps=[1, 2, 5, 10])
    ax.yaxis.set_major_locator(few if high < 8 * low else LogLocator(10, subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(_plain())


def _legend(figure: Figure, **options: Any) -> None:
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, **options)


# --- owner changes and interference ----------------------------------------------------------


def _splits(summary: Summary) -> Iterator[Picture]:
    for group in summary["methods"]:
        pairs = [pair for pair in _members(summary, group) if pair["split"]]
        pairs.sort(
            key=lambda pair: (_natural(pair["first"]), _natural(pair["second"])), reverse=True
        )
        if len(pairs) < _FEWEST:
            continue
        for part, shown in _parts(pairs, 18):
            title = group_name(group) + part
            image = _image(1.3 + 0.24 * len(shown), _split, shown)
            rows = [
                {"first": pair["first"], "second": pair["second"], **pair["split"]}
                for pair in shown
            ]
            yield Picture("split", f"split-{_slug(title)}", title, "", image, rows)


def _parts(items: Sequence[_Item], most: int) -> list[tuple[str, Sequence[_Item]]]:
    """Cut items into parts of similar length, the last first, each with an ending for titles."""
    count = -(-len(items) // most)
    if count < 2:
        return [("", items)] if items else []
    size = -(-len(items) // count)
    return [
        (f", part {count - i}", items[size * i : size * (i + 1)]) for i in reversed(range(count))
    ]


def _split(figure: Figure, ax: Axes, pairs: Sequence[Mapping[str, Any]]) -> None:
    ends = np.zeros((len(pairs), 2))  # left and right
    splits = [pair["split"] for pair in pairs]
    sizes = np.array([abs(split["owner"]) + abs(split["interference"]) or 1.0 for split in splits])
    for part, color, label in (
        ("owner", _BLUE, "weights whose owner changes"),
        ("interference", _ORANGE, "interference"),
    ):
        values = np.array([split[part] for split in splits]) / sizes
        start = np.where(values < 0, ends[:, 0], ends[:, 1])
        ax.barh(range(len(pairs)), values, left=start, color=color, height=0.7, label=label)
        ends[:, 0] += np.minimum(values, 0)
        ends[:, 1] += np.maximum(values, 0)
    for row, split in enumerate(splits):
        text = signed(split["whole"])
        ax.text(1.08, row, text, va="center", ha="left", fontsize=8, clip_on=False)
    labels = [f"{_knob(pair['first'])}, {_knob(pair['second'])}" for pair in pairs]
    ax.set_yticks(
        range(len(pairs)), [textwrap.shorten(label, 24, placeholder="…") for label in labels]
    )
    ax.set_xlim(-1, 1)
    ax.set_ylim(-0.6, len(pairs) - 0.4)
    ax.set_title("share of the whole", fontsize=9)
    ax.annotate("whole", (1.08, 1), (0, 6), ("data", "axes fraction"), "offset points", fontsize=9)
    methods = [Stage.parse(pairs[0][end]).method for end in ("first", "second")]
    ax.set_ylabel(", ".join(methods))
    ax.set_xticks([-1, 0, 1], ["−100 %", "0", "100 %"])
    ax.axvline(0, color=_GREY, lw=0.8)
    ax.tick_params(axis="y", length=0)
    _legend(figure, ncols=2, handlelength=1)


# --- correlation of errors -------------------------------------------------------------------


def _correlations(summary: Summary) -> Iterator[Picture]:
    figures = summary["correlation"]
    if figures is not None:
        caption = (
            f"Mean over {figures['orders']} orders. Each of the {figures['units']} blocks is "
            "compressed alone, and its error is the change of its output; independent errors "
            "would not correlate."
        )
        title = "Correlation of the blocks' errors"
        image = _image(3.6, _correlation, figures)
        rows = [
            {"block": block + 1, "other": other + 1, "correlation": value}
            for block, line in enumerate(figures["matrix"])
            for other, value in enumerate(line)
        ]
        yield Picture("correlation", "correlation", title, caption, image, rows)


def _correlation(figure: Figure, ax: Axes, figures: Mapping[str, Any]) -> None:
    matrix = np.array(figures["matrix"], dtype=float)
    np.fill_diagonal(matrix, np.nan)
    most = max(0.3, float(np.nanmax(np.abs(matrix))))
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most)
    ax.set_facecolor("#dddddd")
    if len(matrix) <= _MOST_NUMBERS:
        for row, column in np.argwhere(np.isfinite(matrix)):
            value = matrix[row, column]
            text = f"{value:.2f}".replace("-", "−")
            _write_cell(ax, row, column, text, dark=abs(value) > 0.65 * most, fontsize=8)
    _color_bar(figure, ax, image, shrink=0.85)
    ticks = range(0, len(matrix), -(-len(matrix) // 12))
    labels = [str(tick + 1) for tick in ticks]
    ax.set_xticks(ticks, labels)
    ax.set_yticks(ticks, labels)
    ax.set_xlabel("block")
    ax.set_ylabel("block")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


# --- orders of three stages or more ----------------------------------------------------------


def _rankings(summary: Summary) -> Iterator[Picture]:
    for number, group in enumerate(summary["rankings"], 1):
        entries = group["ranking"][:30]
        labels = [textwrap.wrap(arrows(entry["order"]), _LETTERS) for entry in entries]
        height = 0.9 + sum(0.22 + 0.16 * len(lines) for lines in labels)
        image = _image(height, _ranking, summary, entries, labels)
        count = len(group["ranking"])
        caption = f"{count} of {group['permutations']} orders, the best first."
        title = ", ".join(group["stages"])
        rows = [
            {"order": entry["order"], "performance": entry["performance"]}
            | {end: (entry["difference"] or {}).get(end) for end in ("mean", "low", "high")}
            for entry in group["ranking"]
        ]
        yield Picture("ranking", f"ranking-{number}", title, caption, image, rows)


def arrows(order: str) -> str:
    """Return an order with arrows between its stages."""
    return order.replace(" > ", " → ")


def _ranking(
    figure: Figure,
    ax: Axes,
    summary: Summary,
    entries: Sequence[Mapping[str, Any]],
    labels: Sequence[Sequence[str]],
) -> None:
    factor = summary["measure"]["factor"]
    best = {"mean": 0.0, "low": 0.0, "high": 0.0, "decisive": True}
    y = 0.0
    for entry, lines in zip(entries, labels, strict=True):
        y += 0.16 * len(lines)
        text = "\n".join(lines)
        transform = ax.get_yaxis_transform()
        ax.text(0.01, y - 0.03, text, transform=transform, va="bottom", fontsize=8.5)
        difference = entry["difference"] or best
        y += 0.11
        ends = [factor * difference[end] for end in ("low", "high")]
        ax.plot(ends, [y, y], color=_BLUE, lw=1.4)
        fill = _BLUE if difference["decisive"] else "white"
        ax.plot(factor * difference["mean"], y, "o", color=_BLUE, mfc=fill, ms=5.5)
        y += 0.11
    ax.set_ylim(y, 0)
    ax.set_yticks([])
    ax.axvline(0, color=_GREY, lw=0.8, zorder=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_xlabel(f"difference in M, {summary['measure']['difference']}")
