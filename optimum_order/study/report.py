"""What a study leaves to read: trials.csv, summary.json, plots, and one report.html."""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimum_order import files
from optimum_order.errors import OutputError, missing_extra
from optimum_order.study import plots
from optimum_order.study.analysis import summarize
from optimum_order.study.plots import arrows, group_name, signed
from optimum_order.study.trials import Trials

try:
    import jinja2
    import markupsafe
except ImportError as error:
    raise missing_extra("study", error) from error

CSV = "trials.csv"
SUMMARY = "summary.json"
PLOTS = "plots"
REPORT = "report.html"

_SCRIPT = Path(__file__).with_name("report.js")
"""Sorts tables. The page allows this script alone, by its digest."""
_FEW = 5
"""Decisive pairs below which nothing is said about a rule."""

Summary = Mapping[str, Any]
Findings = Iterator[tuple[str, str]]


def write(trials: Trials, folder: str | Path) -> dict[str, Any]:
    """Write the report of a study, finished or not, over an earlier report.

    Args:
        trials: The trials of the study.
        folder: Gets trials.csv, summary.json, report.html, and in plots each picture as PNG and SVG
            with its numbers as CSV.

    Returns:
        The contents of summary.json.

    Raises:
        OutputError: If the folder cannot be written.
    """
    folder = Path(folder)
    text = json.dumps(summarize(trials), indent=1, allow_nan=False) + "\n"
    summary: dict[str, Any] = json.loads(text)
    pictures = plots.draw(summary)
    page = render(summary, pictures)
    try:
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        for stale in (folder / PLOTS).iterdir():
            if stale.suffix in (".png", ".svg", ".csv"):
                stale.unlink()
        for picture in pictures:
            for name, drawn in picture.files().items():
                (folder / PLOTS / name).write_bytes(drawn)
        _write_csv(trials, folder / CSV)
        for name, content in ((SUMMARY, text), (REPORT, page)):
            with files.atomic(folder / name) as partial:
                partial.write_text(content, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"The report cannot be written to '{folder}': {error.strerror or error}. Make room "
            "there or choose another folder; the trials are kept, and 'optimum-order study "
            "--report-only' writes it from them."
        ) from error
    return summary


def _write_csv(trials: Trials, file: Path) -> None:
    """Write one row for each trial, with everything that is a single number or text."""
    rows = [_flat(order, draw, row) for (order, draw), row in trials.rows("trials").items()]
    columns = dict.fromkeys(key for row in rows for key in row)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _flat(order: str, draw: int, row: Mapping[str, Any]) -> dict[str, Any]:
    errors = list(row.get("layer_errors", {}).values())
    return {
        "order": order,
        "draw": draw,
        "stages": len(row.get("stages", ())),
        "value": row.get("value"),
        "performance": row["performance"],
        "sparsity": row.get("sparsity"),
        "bits": row.get("bits"),
        "seconds": sum(row["seconds"]) if "seconds" in row else None,
        "cpu_seconds": sum(row["cpu_seconds"]) if "cpu_seconds" in row else None,
        "measure_seconds": row.get("measure_seconds"),
        "measure_cpu_seconds": row.get("measure_cpu_seconds"),
        "mean_layer_error": sum(errors) / len(errors) if errors else None,
        "error": row.get("error"),
        **{f"bytes_{name}": size for name, size in (row.get("bytes") or {}).items()},
    }


# --- in words --------------------------------------------------------------------------------


def findings(summary: Summary) -> list[tuple[str, str]]:
    """Return questions and the answers of the numbers, in plain language.

    Args:
        summary: From `analysis.summarize`.
    """
    answers = (_matters, _hypothesis, _combining, _origin, _independence, _rankings)
    return [finding for answer in answers for finding in answer(summary)]


def _matters(summary: Summary) -> Findings:
    figures = summary["all"]
    if not figures["pairs"]:
        return
    question = "Does the order matter?"
    scale = functools.partial(_scaled, summary)
    text = (
        f"In {_count(figures['pairs'], 'pair')} the two orders differ by "
        f"{scale(figures['mean_absolute_advantage'])} on average, at most by "
        f"{scale(figures['largest_advantage'])}. "
    )
    if not figures["decisive"]:
        yield (
            question,
            f"{text}In none of them does the interval exclude 0: no difference is shown.",
        )
        return
    text += f"The interval excludes 0 in {figures['decisive']}. "
    if all(pair["prunes_and_quantizes"] for pair in summary["pairs"]):
        prune_first = figures["decisive"] - figures["quantize_first"]
        regret = scale(figures["rules"]["prune_first"]["regret"])
        text += (
            f"Of these, pruning first is better in {prune_first} and quantizing first in "
            f"{figures['quantize_first']}. Who always prunes first loses {regret} on average "
            "against always choosing the better order."
        )
    yield question, text


def _hypothesis(summary: Summary) -> Findings:
    figures = summary["all"]
    rule = figures["rules"]["weaker_first"]
    rho = figures["spearman"]
    if not rule["pairs"]:
        return
    text = f"{_verdict(rule, rho)} The Progressive Intensity Hypothesis says to apply the weaker "
    text += "method first. "
    if rule["decisive"] >= _FEW:
        text += f"That is the better order in {_percent(rule['right'])} of {rule['decisive']} "
        text += "decisive pairs"
        prune_first = figures["rules"]["prune_first"]["right"]
        text += "" if prune_first is None else f" (pruning first: {_percent(prune_first)})"
        text += f", and it loses {_scaled(summary, rule['regret'])} on average. "
    if rho["rho"] is not None:
        text += (
            "The rank correlation of quantizing first's advantage with how much stronger pruning "
            f"is: {_rho(rho)}."
        )
    yield "Is it better to apply the weaker method first?", text


def _verdict(rule: Mapping[str, Any], rho: Mapping[str, Any]) -> str:
    rises = rho["low"] is not None and rho["low"] > 0
    falls = rho["high"] is not None and rho["high"] < 0
    if rule["decisive"] < _FEW:
        return (
            f"These numbers cannot say, with {rule['decisive']} of {rule['pairs']} pairs decisive."
        )
    if rule["right"] >= 0.8 and rises:
        return "Yes, here it does."
    if rule["right"] <= 0.5 or falls:
        return "No, here it does not."
    return "Only in part."


def _combining(summary: Summary) -> Findings:
    sentences = []
    names = {"stock": "In formats that stock transformers loads", "any": "With the 'sparse' format"}
    for family, name in names.items():
        figures = summary["combining"][family]
        repeated = family == "any" and figures == summary["combining"]["stock"]
        if not figures["comparable"] or repeated:
            continue
        text = (
            f"{name}, {figures['decisively_better']} of {figures['comparable']} models that were "
            "pruned and quantized are surely better than one of the same size that was only "
            f"pruned or only quantized, and {figures['decisively_worse']} surely worse"
        )
        best = figures["best"]
        gain = best["gain"]
        if gain["low"] > 0:
            text += (
                f"; the most is gained by {arrows(best['order'])} at {files.size(best['bytes'])}: "
                f"{_scaled(summary, gain['mean'])} [{_interval(summary, gain)}]"
            )
        sentences.append(text + ".")
    if sentences:
        yield "Does combining pay at equal bytes?", " ".join(sentences)


def _origin(summary: Summary) -> Findings:
    split = summary["all"]["split"]
    rule = summary["all"]["rules"]["layer_errors"]
    if not split["pairs"] or split["owner_share"] is None:
        return
    text = (
        f"Of the advantage in the output errors of layers, {_percent(split['owner_share'])} comes "
        "from weights that one order prunes and the other does not, the rest from interference in "
        "weights with the same owner."
    )
    if rule["decisive"] >= _FEW:
        text += (
            " The order with less error in its layers is the better one in "
            f"{_percent(rule['right'])} of {rule['decisive']} decisive pairs."
        )
    yield "Where does the difference come from?", text


def _independence(summary: Summary) -> Findings:
    figures = summary["correlation"]
    if figures:
        mean, lowest, highest = (
            _number(figures[key], "+.3f") for key in ("mean", "lowest", "highest")
        )
        yield (
            "Are the errors of different blocks independent?",
            f"They are {figures['verdict']}: the errors of two blocks correlate by {mean} on "
            f"average over {figures['orders']} orders (from {lowest} to {highest}). If all "
            f"{figures['units']} errors were of one size, their sum would have "
            f"{figures['inflation']:.2f} times the squared size that independent ones give. "
            "This was seen on one batch of calibration inputs, with the blocks compressed one at "
            "a time.",
        )


def _rankings(summary: Summary) -> Findings:
    for group in summary["rankings"]:
        best, *others = group["ranking"]
        worse = sum(entry["difference"]["high"] < 0 for entry in others)
        last = others[-1]
        yield (
            f"In which order {', '.join(group['stages'])}?",
            f"{arrows(best['order'])} did best of {len(group['ranking'])} orders; {worse} of the "
            f"others are surely worse. The last, {arrows(last['order'])}, loses "
            f"{_scaled(summary, -last['difference']['mean'])}.",
        )


def table(summary: Summary, *, short: bool = False) -> list[tuple[str, ...]]:
    """Return headings, a row for each pair of methods, and a row for all.

    Args:
        summary: From `analysis.summarize`.
        short: Whether to leave out regrets, intervals, and the rule that needs both orders.
    """
    rules = {
        "prune first": "prune_first",
        "weaker first": "weaker_first",
        "layer errors": "layer_errors",
    }
    if short:
        del rules["layer errors"]
    rows: list[tuple[str, ...]] = [("methods", "pairs", "decisive", "mean |A|", *rules, "rho")]
    for group in [*summary["methods"], summary["all"]] if summary["methods"] else []:
        rows.append(
            (
                group_name(group) if "methods" in group else "all",
                str(group["pairs"]),
                str(group["decisive"]),
                _size(summary, group["mean_absolute_advantage"]),
                *(_rule(summary, group["rules"][rule], short) for rule in rules.values()),
                _rho(group["spearman"] | ({"low": None} if short else {})),
            )
        )
    return rows


def _rule(summary: Summary, rule: Mapping[str, Any], short: bool) -> str:
    """Return how often a rule is right, and its regret."""
    lost = "" if short or rule["regret"] is None else f", {_size(summary, rule['regret'])}"
    return _percent(rule["right"]) + lost


def _size(summary: Summary, value: float) -> str:
    return f"{summary['measure']['factor'] * value:.2g}"


def _scaled(summary: Summary, value: float) -> str:
    """Return the size of a difference in M: 0.012 in log-perplexity."""
    words: str = summary["measure"]["say"]
    return words.format(_size(summary, value))


def _interval(summary: Summary, difference: Mapping[str, Any]) -> str:
    factor = summary["measure"]["factor"]
    return f"{signed(factor * difference['low'])}, {signed(factor * difference['high'])}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}".replace("%", " %")


def _rho(correlation: Mapping[str, Any]) -> str:
    if correlation["rho"] is None:
        return "–"
    low = correlation["low"]
    interval = "" if low is None else f" [{signed(low)}, {signed(correlation['high'])}]"
    return signed(correlation["rho"]) + interval


# --- the page --------------------------------------------------------------------------------

_BYTES = "bytes"
"""The section of the pictures that stand beside the models, above all others."""
_LEGEND = (
    ("P, Q", "a stage that prunes, a stage that quantizes; P → Q applies P first"),
    ("M", "the performance, higher is better: {performance}"),
    ("A(Q → P)", "M of quantizing first less M of pruning first: above 0, quantize first"),
    ("C*", "how strong a stage is alone: 1 − b/16, for {reference} does as well at b bits"),
    ("x", "C* of P less C* of Q: above 0, the pruning is the stronger of the two"),
)
"""The symbols of the report, explained before the first of them is used."""
_SECTIONS = {
    "map": (
        "The advantage of every pair",
        "Orange: quantizing first is better. Violet: pruning first is. Hatched in grey: the "
        "interval includes 0, so that neither is shown to be. All maps have one scale of colors.",
    ),
    "intensity": (
        "Advantage against intensity",
        "A(Q → P) against x = C*P − C*Q, how much stronger pruning is than quantizing. The "
        "hypothesis says that pairs lie in the shaded quarters and rise to the right. A filled "
        "point is decisive, a line its interval, and of a triangle x is only known to lie beyond "
        "it. The scale of A is logarithmic away from 0 where sizes differ much.",
    ),
    "split": (
        "Owner changes and interference",
        "How much of the advantage in the layers' output errors comes from weights that one order "
        "prunes and the other does not, and how much from all others. To the right: quantizing "
        "first has less error. The whole sums, over layers, errors relative to the layer's output.",
    ),
    "correlation": ("Are the blocks' errors independent?", ""),
    "ranking": (
        "Three stages or more",
        "What each order loses against the best, with its interval. The best was chosen by the "
        "same numbers, so that its lead is a little too large.",
    ),
}


def render(summary: Summary, pictures: Sequence[plots.Picture]) -> str:
    """Return the page as one text: pictures are inside, and nothing is loaded from elsewhere.

    Args:
        summary: From `analysis.summarize`.
        pictures: From `plots.draw`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optimum_order.study", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "arrows": arrows,
        "count": _count,
        "interval": functools.partial(_interval, summary),
        "number": _number,
        "percent": _percent,
        "scaled": lambda value: signed(summary["measure"]["factor"] * value),
        "size": files.size,
    }
    script = _SCRIPT.read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    measure = summary["measure"]
    words = {"performance": measure["performance"], "reference": summary["reference"]["method"]}
    sections = [
        (title, text, [picture for picture in pictures if picture.section == key])
        for key, (title, text) in _SECTIONS.items()
    ]
    return environment.get_template("report.html").render(
        summary=summary,
        table=table(summary),
        findings=findings(summary),
        sections=[section for section in sections if section[-1]],
        beside_models=[picture for picture in pictures if picture.section == _BYTES],
        legend=[(symbol, text.format(**words)) for symbol, text in _LEGEND],
        advice=advice(summary),
        script=markupsafe.Markup(script),  # noqa: S704 - a file of this package
        script_digest=digest,
        data=lambda picture: (
            "data:image/png;base64," + base64.b64encode(picture.image.png).decode()
        ),
        advantage=measure["difference"],
    )


def advice(summary: Summary) -> str:
    """Return which model to take, and why, in plain language.

    Args:
        summary: From `analysis.summarize`.
    """
    recommendation = summary["recommendation"]
    if recommendation is None:
        return (
            "No model can be recommended: none that stock transformers loads is smaller than the "
            "original and was measured beside it."
        )
    model = recommendation["model"]
    loss = model["loss"]
    share = _percent(model["bytes"] / recommendation["original_bytes"])
    tolerance = _scaled(summary, recommendation["tolerance"])
    lost = f"{_scaled(summary, max(loss['mean'], 0.0))} [{_interval(summary, loss)}]"
    text = f"{files.size(model['bytes'])}, {share} of the original, for a loss of {lost}"
    value = model["value"]
    before = summary["original"]["value"]
    if value is not None and before is not None:
        metric = summary["measure"]["metric"]
        text += f": {metric} {_number(value, '.4g')}, that of the original {_number(before, '.4g')}"
    if recommendation["within"]:
        return f"{text}. It is the smallest model here that loses at most {tolerance}."
    return (
        f"{text}. No smaller model here loses as little as {tolerance}; this one loses least. More "
        "bits or less pruning would lose less."
    )
