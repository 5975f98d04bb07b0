"""The pictures of a report, from what `analysis.summarize` found: small ones, so that a telephone shows them too."""

from __future__ import annotations

import dataclasses
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator

from optimum_order.order import Stage
from optimum_order.study.study import ORIGINAL

_WIDTH = 4.5  # inches, of which a narrow screen shows about 80 pixels each
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 100,
    "savefig.dpi": 180,
    "text.parse_math": False,
}
# Of Okabe and Ito, whose colours the colour-blind can tell apart.
_BLUE, _ORANGE, _GREEN, _PINK, _GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"
_SIGNS = "PuOr_r"
"""Colours of an advantage: orange where it is positive, violet where it is negative."""
_MOST_NUMBERS = 10
"""Rows or columns of a map up to which each cell has room for its number."""
_LETTERS = 56
"""Of small type in the width of a picture."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        section: Of the report it belongs to.
        name: Of its file, without ending.
        title: What it shows.
        caption: What is particular about it, or "".
        png: The picture itself.
    """

    section: str
    name: str
    title: str
    caption: str
    png: bytes


def draw(summary: Mapping[str, Any]) -> list[Picture]:
    """Every picture there is something to show in.

    Args:
        summary: From `analysis.summarize`.
    """
    with matplotlib.rc_context(_STYLE):
        return [
            *_intensities(summary),
            *_maps(summary),
            *_sizes(summary),
            *_splits(summary),
            *_correlations(summary),
            *_rankings(summary),
        ]


def signed(value: float) -> str:
    """A difference to two digits: +0.012."""
    return f"{value:+.2g}".replace("-", "−") if value else "0"


def name_of(group: Mapping[str, Any]) -> str:
    """A pair of methods as a title."""
    return " × ".join(group["methods"]) + (", off the grid" if group["simulated"] else "")


def _png(height: float, draw: Callable[..., None], *arguments: Any) -> bytes:
    """What `draw(figure, ax, *arguments)` draws."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    draw(figure, figure.subplots(), *arguments)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _slug(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _members(summary: Mapping[str, Any], group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    key = (list(group["methods"]), group["simulated"])
    return [pair for pair in summary["pairs"] if (list(pair["methods"]), pair["simulated"]) == key]


def _wide(values: Sequence[float]) -> float | None:
    """Where values of very different size stop being alike: the linear part of a logarithmic scale; None if not so."""
    size = np.abs([value for value in values if value])
    return (
        float(np.quantile(size, 0.25))
        if len(size) > 2 and size.max() > 20 * np.median(size)
        else None
    )


def _symlog(ax: Axes, linear: float) -> None:
    ax.set_yscale("symlog", linthresh=linear)
    locator = SymmetricalLogLocator(base=10, linthresh=linear)
    locator.set_params(numticks=7)
    ax.yaxis.set_major_locator(locator)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))


# --- A against intensity ---------------------------------------------------------------------------------------------


def _intensities(summary: Mapping[str, Any]) -> list[Picture]:
    found = []
    groups = (
        [("all pairs", "all", summary["all"], summary["pairs"])]
        if len(summary["methods"]) > 1
        else []
    )
    for group in summary["methods"]:
        groups.append((name_of(group), _slug(name_of(group)), group, _members(summary, group)))
    for title, slug, statistics, pairs in groups:
        known = [
            pair for pair in pairs if pair["intensity"] and pair["intensity"]["bound"] != "unknown"
        ]
        if len(known) > 1:
            rho = statistics["spearman"]
            text = "Spearman's rho: " + (
                "not defined" if rho["rho"] is None else f"{rho['rho']:+.2f}"
            )
            if rho["low"] is not None:
                text += f" [{rho['low']:+.2f}, {rho['high']:+.2f}]"
            text = text.replace("-", "−")
            png = _png(3.5, _intensity, summary, known, text)
            caption = f"{text}, over {rho['pairs']} pairs" + (
                f"; x is only a bound in {rho['bounds']} of them." if rho["bounds"] else "."
            )
            found.append(Picture("intensity", f"intensity-{slug}", title, caption, png))
    return found


def _intensity(
    figure: Figure,
    ax: Axes,
    summary: Mapping[str, Any],
    pairs: Sequence[Mapping[str, Any]],
    text: str,
) -> None:
    factor = summary["measure"]["factor"]
    values = [factor * pair["advantage"]["mean"] for pair in pairs]
    if linear := _wide(values):
        _symlog(ax, linear)
    for pair, value in zip(pairs, values, strict=True):
        x, advantage = pair["intensity"], pair["advantage"]
        colour = _ORANGE if value > 0 else _BLUE
        ax.plot(
            [x["value"]] * 2,
            [factor * advantage[end] for end in ("low", "high")],
            color=colour,
            lw=0.8,
            alpha=0.5,
        )
        marker = {"exact": "o", "at least": ">", "at most": "<"}[x["bound"]]
        fill = colour if advantage["decisive"] else "white"
        ax.plot(x["value"], value, marker, color=colour, mfc=fill, ms=5.5, zorder=3)
    low, high = ax.get_xlim()
    edge = 1.05 * max(abs(low), abs(high), 0.01)
    ax.set_xlim(-edge, edge)
    top = max(map(abs, ax.get_ylim()))
    ax.set_ylim(-top, top)
    for x, y in ((0, 0), (-edge, -top)):  # where the hypothesis says that pairs lie
        ax.fill_between([x, x + edge], y, y + top, color="#e9efe6", zorder=0, lw=0)
    ax.axhline(0, color=_GREY, lw=0.8)
    ax.axvline(0, color=_GREY, lw=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.set_xlabel("x = C*P − C*Q   (right: pruning is the stronger)")
    ax.set_ylabel(f"A(Q → P), {summary['measure']['difference']}")
    ax.set_title(text, fontsize=9, loc="left")


# --- map of advantages -----------------------------------------------------------------------------------------------


def _maps(summary: Mapping[str, Any]) -> list[Picture]:
    found = []
    for group in summary["methods"]:
        pairs = _members(summary, group)
        rows, columns = (
            [*dict.fromkeys(pair[end] for pair in pairs)] for end in ("first", "second")
        )
        rows, columns = sorted(rows, key=_natural), sorted(columns, key=_natural)
        if len(pairs) > 1 and len(rows) * len(columns) <= 3 * len(pairs):
            height = 1.3 + 0.42 * min(len(rows), 12)
            png = _png(height, _map, summary, pairs, rows, columns)
            joint = all(pair["prunes_and_quantizes"] for pair in pairs)
            caption = (
                ""
                if joint
                else "Here orange means that the stage below is better first, violet the other."
            )
            found.append(
                Picture("map", f"map-{_slug(name_of(group))}", name_of(group), caption, png)
            )
    return found


def _natural(text: str) -> list[tuple[int, float, str]]:
    """So that 0.5 comes before 0.65 and 8 before 16."""
    return [
        (0, float(part), "") if re.fullmatch(r"[0-9]*\.?[0-9]+", part) else (1, 0.0, part)
        for part in re.split(r"([0-9]*\.?[0-9]+)", text)
        if part
    ]


def _knob(stage: str) -> str:
    value = Stage.parse(stage).value
    return stage if value is None else str(value)


def _map(
    figure: Figure,
    ax: Axes,
    summary: Mapping[str, Any],
    pairs: Sequence[Mapping[str, Any]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> None:
    factor = summary["measure"]["factor"]
    grid = np.full((len(rows), len(columns)), np.nan)
    decisive = np.zeros(grid.shape, bool)
    for pair in pairs:
        at = rows.index(pair["first"]), columns.index(pair["second"])
        grid[at], decisive[at] = factor * pair["advantage"]["mean"], pair["advantage"]["decisive"]
    size = np.abs(grid[np.isfinite(grid)])
    most = float(size.max()) or 1.0
    linear = _wide(size.tolist())
    norm = SymLogNorm(linear, vmin=-most, vmax=most) if linear else Normalize(-most, most)
    image = ax.imshow(grid, cmap=_SIGNS, norm=norm, aspect="auto")
    if max(grid.shape) <= _MOST_NUMBERS:
        for row, column in np.argwhere(np.isfinite(grid)):
            text, dark = signed(grid[row, column]), abs(float(norm(grid[row, column])) - 0.5) > 0.32
            text = text if decisive[row, column] else f"({text})"
            ax.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if dark else "black",
            )
    else:
        bar = figure.colorbar(image, ax=ax)
        bar.outline.set_visible(False)  # type: ignore[operator]
    ax.set_xticks(range(len(columns)), _thinned([_knob(stage) for stage in columns]))
    ax.set_yticks(range(len(rows)), _thinned([_knob(stage) for stage in rows]))
    ax.set_xlabel(Stage.parse(columns[0]).method)
    ax.set_ylabel(Stage.parse(rows[0]).method)
    ax.set_title(f"A, {summary['measure']['difference']}", fontsize=9, loc="left")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def _thinned(labels: Sequence[str]) -> list[str]:
    """At most a dozen of the labels, and none so long that it takes the picture's room."""
    step = -(-len(labels) // 12)
    return [
        textwrap.shorten(label, 18, placeholder="…") if i % step == 0 else ""
        for i, label in enumerate(labels)
    ]


# --- quality against bytes -------------------------------------------------------------------------------------------

_KINDS = {
    "only pruned": ("s", _GREEN),
    "only quantised": ("o", _BLUE),
    "pruned first": ("^", _ORANGE),
    "quantised first": ("v", _PINK),
    "both, in turns": ("D", "#E69F00"),
    "original": ("*", "black"),
}


def _kind(entry: Mapping[str, Any], first: Mapping[str, str]) -> str:
    if entry["kind"] != "joint":
        return "only pruned" if entry["kind"] == "prune" else "only quantised"
    if len(entry["stages"]) > 2:
        return "both, in turns"
    return "pruned first" if first[entry["stages"][0]] == "prune" else "quantised first"


def _sizes(summary: Mapping[str, Any]) -> list[Picture]:
    found = []
    kinds = {
        entry["order"]: entry["kind"] for entry in summary["orders"] if len(entry["stages"]) == 1
    }
    titles = {
        "stock": ("Formats that stock transformers loads", lambda name: name != "sparse"),
        "any": ("The smallest format, 'sparse' included", lambda name: True),
    }
    sparse = any("sparse" in (entry["bytes"] or {}) for entry in summary["orders"])
    for family, (title, counts) in titles.items():
        points = []
        for entry in summary["orders"]:
            sizes = [size for name, size in (entry["bytes"] or {}).items() if counts(name)]
            if sizes and entry["performance"] is not None:
                points.append(
                    (min(sizes), entry["performance"], _kind(entry, kinds), entry["order"])
                )
        original = summary["original"]
        if original["bytes"] and original["performance"] is not None:
            points.append(
                (min(original["bytes"].values()), original["performance"], "original", ORIGINAL)
            )
        if len(points) < 3 or (family == "any" and not sparse):
            continue
        combining = summary["combining"][family]
        front = [point for name in combining["front"] for point in points if point[3] == name]
        lowest = min(m for _, m, _, _ in front)
        span = max(m for _, m, _, _ in front) - lowest or 1.0
        below = sum(m < lowest - 0.15 * span for _, m, _, _ in points)
        caption = f"{below} models far below the line lie outside the picture." if below else ""
        png = _png(4.0, _size, summary, points, front, lowest - 0.15 * span)
        found.append(Picture("bytes", f"bytes-{family}", title, caption, png))
    return found


def _size(
    figure: Figure,
    ax: Axes,
    summary: Mapping[str, Any],
    points: Sequence[tuple[int, float, str, str]],
    front: Sequence[tuple[int, float, str, str]],
    lowest: float,
) -> None:
    unit, name = next(
        ((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if points[0][0] >= u),
        (1, "bytes"),
    )
    factor = summary["measure"]["factor"]
    ax.plot(
        [p[0] / unit for p in front], [factor * p[1] for p in front], color=_GREY, lw=1.2, zorder=1
    )
    for kind, (marker, colour) in _KINDS.items():
        shown = [p for p in points if p[2] == kind and p[1] >= lowest]
        if shown:
            x, y = [p[0] / unit for p in shown], [factor * p[1] for p in shown]
            size = 90 if kind == "original" else 26
            ax.scatter(
                x, y, size, color=colour, marker=marker, label=kind, alpha=0.8, lw=0, zorder=2
            )
    ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    ax.set_xlabel(f"weights on disk, {name}")
    ax.set_ylabel(f"M: {summary['measure']['performance']}")
    ax.grid(color="#eeeeee")
    figure.legend(
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
        handletextpad=0.3,
        columnspacing=1,
    )


# --- owner changes and interference ----------------------------------------------------------------------------------


def _splits(summary: Mapping[str, Any]) -> list[Picture]:
    found = []
    for group in summary["methods"]:
        pairs = [pair for pair in _members(summary, group) if pair["split"]]
        pairs.sort(
            key=lambda pair: (_natural(pair["first"]), _natural(pair["second"])), reverse=True
        )
        for part, shown in _parts(pairs, 18):
            title = name_of(group) + part
            png = _png(1.3 + 0.24 * len(shown), _split, shown)
            found.append(Picture("split", f"split-{_slug(title)}", title, "", png))
    return found


def _parts(items: Sequence[Any], most: int) -> list[tuple[str, Sequence[Any]]]:
    count = -(-len(items) // most)
    if count < 2:
        return [("", items)] if items else []
    size = -(-len(items) // count)
    return [
        (f", part {count - i}", items[size * i : size * (i + 1)]) for i in reversed(range(count))
    ]


def _split(figure: Figure, ax: Axes, pairs: Sequence[Mapping[str, Any]]) -> None:
    ends = np.zeros((len(pairs), 2))  # left and right
    sizes = np.array(
        [abs(pair["split"]["owner"]) + abs(pair["split"]["interference"]) or 1.0 for pair in pairs]
    )
    for part, colour, label in (
        ("owner", _BLUE, "weights whose owner changes"),
        ("interference", _ORANGE, "interference"),
    ):
        values = np.array([pair["split"][part] for pair in pairs]) / sizes
        start = np.where(values < 0, ends[:, 0], ends[:, 1])
        ax.barh(range(len(pairs)), values, left=start, color=colour, height=0.7, label=label)
        ends[:, 0] += np.minimum(values, 0)
        ends[:, 1] += np.maximum(values, 0)
    for at, pair in enumerate(pairs):
        ax.text(
            1.08,
            at,
            signed(pair["split"]["whole"]),
            va="center",
            ha="left",
            fontsize=8,
            clip_on=False,
        )
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
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8, handlelength=1)


# --- correlation of errors -------------------------------------------------------------------------------------------


def _correlations(summary: Mapping[str, Any]) -> list[Picture]:
    found = summary["correlation"]
    if found is None:
        return []
    caption = (
        f"Mean over {found['orders']} orders. Each of the {found['units']} blocks is compressed alone, and its error "
        "is what this adds to its output; independent errors would not correlate."
    )
    png = _png(3.6, _correlation, found)
    return [
        Picture("correlation", "correlation", "Correlation of the blocks' errors", caption, png)
    ]


def _correlation(figure: Figure, ax: Axes, found: Mapping[str, Any]) -> None:
    matrix = np.array(found["matrix"], dtype=float)
    np.fill_diagonal(matrix, np.nan)
    most = max(0.3, float(np.nanmax(np.abs(matrix))))
    image = ax.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most)
    ax.set_facecolor("#dddddd")
    if len(matrix) <= _MOST_NUMBERS:
        for row, column in np.argwhere(np.isfinite(matrix)):
            value = matrix[row, column]
            colour = "white" if abs(value) > 0.65 * most else "black"
            text = f"{value:.2f}".replace("-", "−")
            ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    bar = figure.colorbar(image, ax=ax, shrink=0.85)
    bar.outline.set_visible(False)  # type: ignore[operator]
    ticks = range(0, len(matrix), -(-len(matrix) // 12))
    ax.set_xticks(ticks, [str(tick + 1) for tick in ticks])
    ax.set_yticks(ticks, [str(tick + 1) for tick in ticks])
    ax.set_xlabel("block")
    ax.set_ylabel("block")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


# --- orders of three stages or more ----------------------------------------------------------------------------------


def _rankings(summary: Mapping[str, Any]) -> list[Picture]:
    found = []
    for number, group in enumerate(summary["rankings"], 1):
        shown = group["ranking"][:30]
        lines = [textwrap.wrap(each["order"].replace(" > ", " → "), _LETTERS) for each in shown]
        height = 0.9 + sum(0.22 + 0.16 * len(each) for each in lines)
        png = _png(height, _ranking, summary, shown, lines)
        stages, count = ", ".join(group["stages"]), len(group["ranking"])
        caption = f"{count} of {group['permutations']} orders, the best first."
        found.append(Picture("ranking", f"ranking-{number}", stages, caption, png))
    return found


def _ranking(
    figure: Figure,
    ax: Axes,
    summary: Mapping[str, Any],
    shown: Sequence[Mapping[str, Any]],
    lines: Sequence[Sequence[str]],
) -> None:
    factor, y = summary["measure"]["factor"], 0.0
    for each, text in zip(shown, lines, strict=True):
        y += 0.16 * len(text)
        label = "\n".join(text)
        ax.text(
            0.01, y - 0.03, label, transform=ax.get_yaxis_transform(), va="bottom", fontsize=8.5
        )
        found = each["difference"] or {"mean": 0.0, "low": 0.0, "high": 0.0, "decisive": False}
        y += 0.11
        ax.plot([factor * found["low"], factor * found["high"]], [y, y], color=_BLUE, lw=1.4)
        fill = _BLUE if found["decisive"] or each["difference"] is None else "white"
        ax.plot(factor * found["mean"], y, "o", color=_BLUE, mfc=fill, ms=5.5)
        y += 0.11
    ax.set_ylim(y, 0)
    ax.set_yticks([])
    ax.axvline(0, color=_GREY, lw=0.8, zorder=0)
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.set_xlabel(f"difference in M, {summary['measure']['difference']}")
