"""What a study leaves to read: trials.csv, summary.json, plots, and one report.html that needs nothing else."""

from __future__ import annotations

import base64
import csv
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from optimum_order.errors import OutputError
from optimum_order.files import size
from optimum_order.study import plots
from optimum_order.study.analysis import summarize
from optimum_order.study.plots import name_of, signed
from optimum_order.study.study import Trials

CSV, SUMMARY, PLOTS, REPORT = "trials.csv", "summary.json", "plots", "report.html"

_FEW = 5
"""Decisive pairs below which nothing is said about a rule."""


def write(trials: Trials, folder: str | Path) -> dict[str, Any]:
    """Write the report of a study, finished or not; what an earlier one left is replaced.

    Args:
        trials: Of the study.
        folder: Gets trials.csv, summary.json, plots/*.png and report.html.

    Returns:
        What is in summary.json.

    Raises:
        OutputError: If the folder cannot be written.
    """
    folder = Path(folder)
    summary = json.loads(json.dumps(summarize(trials), allow_nan=False))
    pictures = plots.draw(summary)
    page = render(summary, pictures)
    try:
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        for stale in (folder / PLOTS).glob("*.png"):
            stale.unlink()
        for picture in pictures:
            (folder / PLOTS / f"{picture.name}.png").write_bytes(picture.png)
        _write_csv(trials, folder / CSV)
        _replace(folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
        _replace(folder / REPORT, page)
    except OSError as error:
        raise OutputError(
            f"The report cannot be written to '{folder}': {error.strerror or error}. Make room there or choose another "
            "folder; the trials are kept, and 'optimum-order study --report-only' writes it from them."
        ) from error
    return summary


def _replace(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def _write_csv(trials: Trials, file: Path) -> None:
    """One row for each trial, all that is a single number or text."""
    found = [_flat(order, draw, row) for (order, draw), row in trials.rows("trials").items()]
    columns = dict.fromkeys(key for row in found for key in row)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(columns))
        writer.writeheader()
        writer.writerows(found)


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
        **{f"bytes_{name}": count for name, count in (row.get("bytes") or {}).items()},
    }


# --- in words --------------------------------------------------------------------------------------------------------


def findings(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Questions and what the numbers answer, in plain language."""
    answers = (_matters, _hypothesis, _combining, _origin, _independence, _rankings)
    return [found for answer in answers for found in answer(summary)]


def _matters(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = summary["all"]
    if not found["pairs"]:
        return
    scale = functools.partial(_scaled, summary)
    rules = found["rules"]
    text = (
        f"In {_count(found['pairs'], 'pair')} the two orders differ by {scale(found['mean_absolute_advantage'])} on "
        f"average, at most by {scale(found['largest_advantage'])}. "
    )
    if not found["decisive"]:
        yield (
            "Does the order matter?",
            text + "In none of them does the interval exclude 0: no difference is shown.",
        )
        return
    text += f"The interval excludes 0 in {found['decisive']}. "
    both = all(pair["prunes_and_quantizes"] for pair in summary["pairs"])
    if both:
        first = found["decisive"] - found["quantize_first"]
        text += f"Of these, pruning first is better in {first} and quantising first in {found['quantize_first']}. "
        regret = rules["prune_first"]["regret"]
        text += f"Who always prunes first loses {scale(regret)} on average against always choosing the better order."
    yield "Does the order matter?", text


def _hypothesis(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = summary["all"]
    rule, rho = found["rules"]["weaker_first"], found["spearman"]
    if not rule["pairs"]:
        return
    right, low, high = rule["right"], rho["low"], rho["high"]
    rises, falls = low is not None and low > 0, high is not None and high < 0
    if rule["decisive"] < _FEW:
        verdict = (
            f"These numbers cannot say, with {rule['decisive']} of {rule['pairs']} pairs decisive."
        )
    elif right >= 0.8 and rises:
        verdict = "Yes, here it does."
    elif right <= 0.5 or falls:
        verdict = "No, here it does not."
    else:
        verdict = "Only in part."
    text = f"{verdict} The Progressive Intensity Hypothesis says to apply the weaker method first. "
    if rule["decisive"] >= _FEW:
        text += (
            f"That is the better order in {_percent(right)} of {rule['decisive']} decisive pairs"
        )
        other = found["rules"]["prune_first"]["right"]
        text += f" (pruning first: {_percent(other)})" if other is not None else ""
        text += f", and it loses {_scaled(summary, rule['regret'])} on average. "
    if rho["rho"] is not None:
        text += f"The rank correlation of quantising first's advantage with how much stronger pruning is: {_rho(rho)}."
    yield "Is it better to apply the weaker method first?", text


def _combining(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sentences = []
    names = {"stock": "In formats that stock transformers loads", "any": "With the 'sparse' format"}
    for family, name in names.items():
        found = summary["combining"][family]
        if not found["comparable"] or (family == "any" and found == summary["combining"]["stock"]):
            continue
        text = (
            f"{name}, {found['decisively_better']} of {found['comparable']} models that were pruned and quantised are "
            f"surely better than one of the same size that was only pruned or only quantised, and "
            f"{found['decisively_worse']} surely worse"
        )
        best = found["best"]
        if best["gain"]["low"] > 0:
            gain = best["gain"]
            text += (
                f"; the most is gained by {_arrows(best['order'])} at {size(best['bytes'])}: "
                f"{_scaled(summary, gain['mean'])} [{_interval(summary, gain)}]"
            )
        sentences.append(text + ".")
    if sentences:
        yield "Does combining pay at equal bytes?", " ".join(sentences)


def _origin(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = summary["all"]
    split, rule = found["split"], found["rules"]["layer_errors"]
    if not split["pairs"] or split["owner_share"] is None:
        return
    text = (
        f"Of the advantage in the output errors of layers, {_percent(split['owner_share'])} comes from weights that "
        "one order prunes and the other does not, the rest from interference in weights with the same owner."
    )
    if rule["decisive"] >= _FEW:
        text += (
            f" The order with less error in its layers is the better one in {_percent(rule['right'])} of "
            f"{rule['decisive']} decisive pairs."
        )
    yield "Where does the difference come from?", text


def _independence(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    found = summary["correlation"]
    if found:
        mean, lowest, highest = (
            _number(found[key], "+.3f") for key in ("mean", "lowest", "highest")
        )
        yield (
            "Are the errors of different blocks independent?",
            f"They are {found['verdict']}: the errors of two blocks correlate by {mean} on average "
            f"over {found['orders']} orders (from {lowest} to {highest}). If all {found['units']} errors were of one "
            f"size, their sum would have {found['inflation']:.2f} times the squared size that independent ones give. "
            "This was seen on one batch of calibration inputs, with the blocks compressed one at a time.",
        )


def _rankings(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for group in summary["rankings"]:
        best, *others = group["ranking"]
        worse = sum(each["difference"]["high"] < 0 for each in others)
        loss = _scaled(summary, -others[-1]["difference"]["mean"])
        yield (
            f"In which order {', '.join(group['stages'])}?",
            f"{_arrows(best['order'])} did best of {len(group['ranking'])} orders; {worse} of the others are surely "
            f"worse. The last, {_arrows(others[-1]['order'])}, loses {loss}.",
        )


def table(summary: Mapping[str, Any], *, short: bool = False) -> list[tuple[str, ...]]:
    """A row for each pair of methods and one for all, below a row of headings.

    Args:
        summary: From `analysis.summarize`.
        short: Whether to leave out what a rule loses, the rule that needs both orders, and intervals.
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
                name_of(group) if "methods" in group else "all",
                str(group["pairs"]),
                str(group["decisive"]),
                _size(summary, group["mean_absolute_advantage"]),
                *(_rule(summary, group["rules"][rule], short) for rule in rules.values()),
                _rho(group["spearman"] | ({"low": None} if short else {})),
            )
        )
    return rows


def _rule(summary: Mapping[str, Any], found: Mapping[str, Any], short: bool) -> str:
    """How often a rule is right, and what it loses."""
    lost = "" if short or found["regret"] is None else f", {_size(summary, found['regret'])}"
    return _percent(found["right"]) + lost


def _size(summary: Mapping[str, Any], value: float) -> str:
    return f"{summary['measure']['factor'] * value:.2g}"


def _scaled(summary: Mapping[str, Any], value: float) -> str:
    """A size of a difference in M: 0.012 in log-perplexity."""
    return summary["measure"]["say"].format(_size(summary, value))


def _interval(summary: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    factor = summary["measure"]["factor"]
    return f"{signed(factor * found['low'])}, {signed(factor * found['high'])}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("-", "−")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}".replace("%", " %")


def _rho(found: Mapping[str, Any]) -> str:
    if found["rho"] is None:
        return "–"
    interval = "" if found["low"] is None else f" [{signed(found['low'])}, {signed(found['high'])}]"
    return signed(found["rho"]) + interval


def _arrows(order: str) -> str:
    return order.replace(" > ", " → ")


# --- the page --------------------------------------------------------------------------------------------------------

_SECTIONS = {
    "intensity": (
        "Advantage against intensity",
        "A(Q → P) against x = C*P − C*Q, how much stronger pruning is than quantising. The hypothesis says that pairs "
        "lie in the shaded quarters and rise to the right. A filled point is decisive, a line its interval, and of a "
        "triangle x is only known to lie beyond it. The scale of A is logarithmic away from 0 where sizes differ much.",
    ),
    "map": (
        "The advantage of every pair",
        "Orange: quantising first is better. Violet: pruning first is. In brackets: the interval includes 0.",
    ),
    "bytes": (
        "Quality against bytes",
        "Higher is better. The line joins the models that no other beats in both size and quality.",
    ),
    "split": (
        "Owner changes and interference",
        "How much of the advantage in the layers' output errors comes from weights that one order prunes and the other "
        "does not, and how much from all others. To the right: quantising first has less error. The whole sums, over "
        "layers, errors relative to the layer's output.",
    ),
    "correlation": ("Are the blocks' errors independent?", ""),
    "ranking": (
        "Three stages or more",
        "What each order loses against the best, with its interval. The best was chosen by the same numbers, so that "
        "its lead is a little too large.",
    ),
}


def render(summary: Mapping[str, Any], pictures: Sequence[plots.Picture]) -> str:
    """The page, all of it in one text: pictures are inside, and nothing is loaded from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optimum_order.study", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "arrows": _arrows,
        "count": _count,
        "interval": functools.partial(_interval, summary),
        "name": name_of,
        "number": _number,
        "percent": _percent,
        "rho": _rho,
        "scaled": lambda value: signed(summary["measure"]["factor"] * value),
        "size": size,
    }
    sections = [
        (*about, [picture for picture in pictures if picture.section == key])
        for key, about in _SECTIONS.items()
    ]
    return environment.get_template("report.html").render(
        summary=summary,
        table=table(summary),
        findings=findings(summary),
        sections=[section for section in sections if section[-1]],
        data=lambda picture: "data:image/png;base64," + base64.b64encode(picture.png).decode(),
        advantage=summary["measure"]["difference"],
    )
