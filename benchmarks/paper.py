"""The paper's findings on our models: the figures of benchmarks/paper.md, from the folders of the studies.

    python benchmarks/paper.py --run mild 1         one draw of one study, resumed where it was stopped
    python benchmarks/paper.py --run mild           all three
    python benchmarks/paper.py --run mild --workers 4                  in processes of this machine
    python benchmarks/paper.py --run mild --workers 4 --cluster auto   on a Ray cluster
    python benchmarks/paper.py --run pairs --model smollm2 --calibration valid.txt --evaluation test.txt
    python benchmarks/paper.py                      the tables, of what has been run
    python benchmarks/paper.py --store              and benchmarks/findings.json, which paper.md is written from

The studies of benchmarks/planner.py are read from its own folder, `--planner`. With `--model` a study runs on any
model, and its folder is named after both.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from planner import DRAWS, GRIDS, PRUNERS, QUANTIZERS, Setting, worker
from rich.console import Console
from rich.table import Table

from optimum_order import JointCompressor, Order, Stage
from optimum_order.engine.recipe import canonical, method
from optimum_order.evaluation.comparison import difference_over_draws
from optimum_order.study.analysis import summarize
from optimum_order.study.crew import Spec, crew
from optimum_order.study.grid import grid, with_parts
from optimum_order.study.run import Study, quiet
from optimum_order.study.trials import ORIGINAL, TRIALS, Trials

STORED = Path(__file__).with_name("findings.json")
PREFIX_BYTES = 4 * 10**9
"""Disk space for beginnings that orders share, for each worker."""
SPARSEGPT = [Stage("sparsegpt")]
TEXTBOOK = [Stage("rtn", clip="none"), Stage("gptq", clip="none")]
MILD = ([0.1, 0.2, 0.3, 0.4], QUANTIZERS, [3, 4, 5, 6])
STRONG = ([0.3, 0.5, 0.65], QUANTIZERS, [2, 3, 4])
MIXED = [
    f"mixed_precision(bits=3, widths=[2, 4], first={first})" for first in ("weaker", "stronger")
]

STUDIES: dict[str, tuple[str, list[Order]]] = {
    "mild": ("tiny-llama", grid(SPARSEGPT, *MILD)),
    "mild-off-grid": ("tiny-llama", grid(SPARSEGPT, *MILD, simulate=True)),
    "strong-off-grid": ("tiny-llama", grid(SPARSEGPT, *STRONG, simulate=True)),
    "textbook": ("tiny-llama", grid(PRUNERS[:2], [0.3, 0.5, 0.65], TEXTBOOK, [2])),
    "mixed": ("tiny-llama", [Order.parse(line) for line in MIXED]),
    "vit-mild": ("tiny-vit", grid(SPARSEGPT, *MILD)),
    "vit-mild-off-grid": ("tiny-vit", grid(SPARSEGPT, *MILD, simulate=True)),
    "resnet-mild": ("tiny-resnet", grid(SPARSEGPT, *MILD)),
    "resnet-mild-off-grid": ("tiny-resnet", grid(SPARSEGPT, *MILD, simulate=True)),
    "vit-off-grid": ("tiny-vit", grid(PRUNERS, [0.4, 0.6], QUANTIZERS, [2, 3], simulate=True)),
}
"""Each study's model and orders, beside those of the planner's benchmark."""


def _rotated(pruner: str, quantizer: str) -> list[Order]:
    """Return the places that a pruner may take beside a rotation and its quantizer.

    A quantizer with a rotation is one method to the paper, so a pruner after the two prunes in the rotated basis.
    """
    rotate = "rotate(force=true)"  # of pruned weights too, whose zeros do not survive
    places = [(pruner, rotate, quantizer), (rotate, pruner, quantizer), (rotate, quantizer, pruner)]
    return [Order.parse(" > ".join(stages)) for stages in places]


def _both(first: str, second: str) -> list[Order]:
    return [Order.parse(f"{first} > {second}"), Order.parse(f"{second} > {first}")]


ROTATED = ("sparsegpt:0.05", "sparsegpt:0.4", "wanda:0.4", "depth:1")
SMALLER = ("width:0.1", "width:0.2", "depth:1")
RECOVERED = "width:0.2 > gptq:4 > distill(steps=100, batch_size=1)"
FOUR = "width:0.1 > wanda:0.3 > gptq:4 > refit(batch_size=1)"
FIVE = "rotate > width:0.1 > wanda:0.3 > gptq:4 > refit(batch_size=1)"


def _rotated_in_time(order: Order) -> bool:
    """Return whether nothing is pruned or on a grid when the rotation comes, which then is refused."""
    methods = [stage.method for stage in order]
    return methods.index("rotate") < min(methods.index("wanda"), methods.index("gptq"))


PAUSES = {"block": "", "group": "-by-groups"}
"""Where runs pause, and what the names of their folders end in. The stored studies pause at blocks."""
FINDINGS: dict[str, list[Order]] = {
    "pairs": grid(PRUNERS, [0.3, 0.5], QUANTIZERS, [3, 4]),
    "few-pairs": grid(PRUNERS[1:], [0.3, 0.5], [Stage("gptq")], [3, 4]),
    "rotation": [
        order for pruner in ROTATED for order in _rotated(pruner, "gptq(bits=4, group_size=-1)")
    ],
    "structured": [
        order for first in SMALLER for bits in (8, 6, 4) for order in _both(first, f"gptq:{bits}")
    ],
    "mixed-precision": [
        Order.parse(f"mixed_precision(bits={bits}, widths=[2, 4, 8], first={first})")
        for bits in (3, 3.5, 4)
        for first in ("weaker", "stronger")
    ],
    "rate": [
        order
        for first in ("wanda:0.3", "wanda:0.5", "sparsegpt:0.3", "sparsegpt:0.5")
        for rate in (2.5, 3.5)
        for order in _both(first, f"ecsq:{rate}")
    ],
    "recovery": list(Order.parse(RECOVERED).permutations()),
    "four-stages": list(Order.parse(FOUR).permutations()),
    "five-stages": list(filter(_rotated_in_time, Order.parse(FIVE).permutations())),
}
"""What is tried on a model of one's own, one study for each finding."""
ENDINGS = tuple(f"-{name}{ending}" for name in FINDINGS for ending in PAUSES.values())
"""Of the names of their folders."""


def findings(name: str, args: argparse.Namespace, draws: list[int]) -> None:
    """Run a study of FINDINGS on `--model`."""
    compressor = JointCompressor.from_pretrained(
        args.model,
        calibration=args.calibration,
        calibration_samples=args.samples,
        sequence_length=args.length,
    )
    compressor.study(
        FINDINGS[name],
        args.output / f"{Path(args.model).name}-{name}{PAUSES[args.pause]}",
        draws=draws,
        pause=args.pause,
        metric=args.metric,
        evaluation=args.evaluation,
        evaluation_samples=args.evaluation_samples,
        workers=args.workers,
        cluster=args.cluster,
    )


def run(
    name: str, folder: Path, draws: list[int], workers: int = 1, cluster: str | None = None
) -> None:
    model, orders = STUDIES[name]
    study = Setting(model).study(folder)
    on_the_grid = folder.with_name(name.removesuffix("-off-grid"))
    if name.endswith("-off-grid") and (on_the_grid / TRIALS).exists():
        borrow(study, Trials.open(on_the_grid), orders, draws)
    if workers == 1 and cluster is None:
        study.run(orders, draws)
        return
    spec = Spec(functools.partial(worker, model), torch.get_num_threads(), PREFIX_BYTES)
    with contextlib.closing(crew(spec, workers, cluster)) as shared:
        study.run(orders, draws, crew=shared)


def borrow(study: Study, other: Trials, orders: Iterable[Order], draws: Iterable[int]) -> None:
    """Take over the trials that are the same off the grid as on it: those in which nothing prunes a quantised layer."""
    if other.settings != study.trials.settings:
        raise SystemExit(
            f"'{other.folder}' has other settings than '{study.folder}': choose another output."
        )
    rows, done = other.rows("trials"), study.trials.done()
    for order in with_parts(canonical(order) for order in orders):
        quantizes = [method(stage).kind == "quantize" for stage in order]
        if quantizes == sorted(quantizes):
            name = str(canonical(Order(_on_grid(stage) for stage in order)))
            for draw in draws:
                if (name, draw) in rows and (str(order), draw) not in done:
                    study.trials.add({("trials", str(order), draw): rows[name, draw]})


def _on_grid(stage: Stage) -> Stage:
    return Stage(
        stage.method, **{k: v for k, v in method(stage).resolved.items() if k != "off_grid"}
    )


def gain(pair: Mapping[str, Any]) -> float:
    """Of pruning first."""
    return -pair["advantage"]["mean"]


def signs(summaries: Mapping[str, dict]) -> Table:
    """What each study says of the sign and of how A(Q -> P) goes with the intensity."""
    table = Table(
        title="A(Q -> P) against C*_P - C*_Q, and how often three rules are right in decisive pairs",
        title_justify="left",
    )
    for column in (
        "study",
        "draws",
        "pairs",
        "decisive",
        "rho [interval]",
        "weaker first",
        "prune first",
        "layer errors",
        "mean |A|",
    ):
        table.add_column(column, justify="left" if column == "study" else "right", no_wrap=True)
    for name, summary in summaries.items():
        figures = summary["all"]
        if not figures["pairs"]:
            continue
        rho, rules = figures["spearman"], figures["rules"]
        interval = "" if rho.get("low") is None else f" [{rho['low']:+.2f}, {rho['high']:+.2f}]"
        factor = summary["measure"]["factor"]
        table.add_row(
            name,
            str(len(summary["draws"])),
            str(figures["pairs"]),
            str(figures["decisive"]),
            "-" if rho["rho"] is None else f"{rho['rho']:+.2f}{interval}",
            *(_share(rules[rule]) for rule in ("weaker_first", "prune_first", "layer_errors")),
            f"{factor * figures['mean_absolute_advantage']:.3f}",
        )
    return table


def _share(rule: Mapping[str, Any]) -> str:
    return "-" if rule["right"] is None else f"{rule['right']:.0%} of {rule['decisive']}"


def by_setting(name: str, summary: Mapping[str, Any]) -> Table:
    """Mean gain of pruning first and mean absolute interference, by bits and by sparsity."""
    factor, groups = summary["measure"]["factor"], defaultdict(list)
    for pair in summary["pairs"]:
        for stage in (pair["first"], pair["second"]):
            chosen = method(Order.parse(stage)[0])
            knob = "bits" if chosen.kind == "quantize" else "sparsity"
            groups[f"{knob} {chosen.resolved[knob]:g}"].append(pair)
    table = Table(title=f"{name}: by setting", title_justify="left")
    for column in ("setting", "pairs", "gain of pruning first", "mean |interference|"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    for setting, pairs in sorted(groups.items()):
        splits = [abs(pair["split"]["interference"]) for pair in pairs if pair["split"]]
        mean = f"{statistics.fmean(splits):.3f}" if splits else "-"
        table.add_row(
            setting, str(len(pairs)), f"{factor * statistics.fmean(map(gain, pairs)):+.3f}", mean
        )
    return table


def pairs(name: str, summary: Mapping[str, Any]) -> Table:
    """Both orders of each pair, and A(second -> first) with its interval."""
    factor = summary["measure"]["factor"]
    values = {entry["order"]: entry["value"] for entry in summary["orders"]}
    table = Table(title=f"{name}: pairs", title_justify="left")
    for column in ("first", "second", "in this order", "the other way round", "gain of this order"):
        table.add_column(column, justify="left" if column in ("first", "second") else "right")
    for pair in summary["pairs"]:
        first, second, advantage = pair["first"], pair["second"], pair["advantage"]
        orders = (f"{first} > {second}", f"{second} > {first}")
        low, high = sorted((-factor * advantage["low"], -factor * advantage["high"]))
        table.add_row(
            *(first, second),
            *("-" if values[order] is None else f"{values[order]:.4g}" for order in orders),
            f"{-factor * advantage['mean']:+.4f} ({low:+.4f} to {high:+.4f})",
        )
    return table


def rankings(name: str, summary: Mapping[str, Any]) -> Table:
    """All orders of the same stages, best first, with how far each is behind the first."""
    factor = summary["measure"]["factor"]
    values = {entry["order"]: entry["value"] for entry in summary["orders"]}
    table = Table(title=f"{name}: orders of the same stages", title_justify="left")
    for column in ("order", summary["measure"]["metric"], "behind", "interval"):
        table.add_column(column, justify="left" if column == "order" else "right")
    for ranking in summary["rankings"]:
        for row in ranking["ranking"]:
            value, gap = values.get(row["order"]), row["difference"]
            behind = interval = ""
            if row is not ranking["ranking"][0] and gap:
                behind = f"{-factor * gap['mean']:.4f}"
                low, high = sorted((-factor * gap["low"], -factor * gap["high"]))
                interval = f"{low:+.4f} to {high:+.4f}"
            table.add_row(row["order"], "-" if value is None else f"{value:.4g}", behind, interval)
        table.add_section()
    return table


_SIDES = ("mean", "low", "high")
_FIRST = ("first=weaker", "first=stronger")


def choices(trials: Trials) -> list[dict[str, Any]]:
    """Return what stages gain by taking the stronger first, where orders differ in nothing else."""
    performances: dict[str, list[list[float]]] = defaultdict(list)
    for (order, _), row in sorted(trials.rows("trials").items()):
        performances[order].append(row["performances"])
    gains = []
    for order, weaker in performances.items():
        stronger = performances.get(order.replace(*_FIRST)) if _FIRST[0] in order else None
        if stronger is not None and len(stronger) == len(weaker):
            differences = torch.tensor(stronger).double() - torch.tensor(weaker).double()
            gain = difference_over_draws(differences)
            gains.append({"order": order, **{side: getattr(gain, side) for side in _SIDES}})
    return gains


def swaps(trials: Trials) -> list[dict[str, Any]]:
    """Return what neighbors in orders of three stages or more gain by standing in the better order.

    Of two stages, every order in which the first stands right before the second is compared with the order in which
    the two have changed places and nothing else has.
    """
    performances: dict[tuple[Stage, ...], list[list[float]]] = defaultdict(list)
    for (text, _), row in sorted(trials.rows("trials").items()):
        if text != ORIGINAL and len(order := Order.parse(text)) > 2:
            performances[order.stages].append(row["performances"])
    gains: dict[tuple[Stage, Stage], list[torch.Tensor]] = defaultdict(list)
    for stages, figures in performances.items():
        for place, (first, second) in enumerate(itertools.pairwise(stages)):
            other = performances.get((*stages[:place], second, first, *stages[place + 2 :]))
            if other is not None and len(other) == len(figures):
                gain = torch.tensor(figures).double() - torch.tensor(other).double()
                gains[first, second].append(gain)
    result = []
    for (first, second), made in gains.items():
        mean = difference_over_draws(torch.stack(made).mean(0))
        if mean.mean > 0:
            better = sum(bool(gain.mean() > 0) for gain in made)
            about = {"first": str(first), "second": str(second), "swaps": len(made)}
            sides = {side: getattr(mean, side) for side in _SIDES}
            result.append(about | {"better": better} | sides)
    return sorted(result, key=lambda one: -one["mean"])


def neighbors(name: str, gains: Iterable[Mapping[str, Any]]) -> Table:
    """Which of two neighboring stages goes first, over all places and all that stands around them."""
    table = Table(title=f"{name}: neighbors that change places", title_justify="left")
    for column in ("first", "second"):
        table.add_column(column)
    for column in ("better in", "gain of M"):
        table.add_column(column, justify="right")
    for one in gains:
        interval = f"{one['mean']:+.4f} ({one['low']:+.4f} to {one['high']:+.4f})"
        table.add_row(one["first"], one["second"], f"{one['better']} of {one['swaps']}", interval)
    return table


def stored(summary: Mapping[str, Any], trials: Trials) -> dict[str, Any]:
    """Return the part of a study that the repository holds."""

    def interval(difference: Mapping[str, Any]) -> dict[str, float]:
        return {key: round(difference[key], 5) for key in _SIDES}

    return {
        "draws": summary["draws"],
        "values": {
            entry["order"]: entry["value"] and round(entry["value"], 5)
            for entry in summary["orders"]
        },
        "bytes": {entry["order"]: entry["bytes"] for entry in summary["orders"]},
        "pairs": [
            {"first": pair["first"], "second": pair["second"], **interval(pair["advantage"])}
            for pair in summary["pairs"]
        ],
        "rankings": [
            [
                {"order": row["order"]} | interval(row["difference"] or dict.fromkeys(_SIDES, 0.0))
                for row in one["ranking"]
            ]
            for one in summary["rankings"]
        ],
        "choices": [{"order": one["order"]} | interval(one) for one in choices(trials)],
        "swaps": [one | interval(one) for one in swaps(trials)],
    }


def sentences(name: str, summary: Mapping[str, Any]) -> list[str]:
    """The figures that need no table."""
    figures, said = summary["all"], []
    if figures["pairs"]:
        share = figures["split"]["owner_share"]
        said.append(
            f"{figures['quantize_first']} of {figures['decisive']} decisive pairs favour quantising first"
        )
        if share is not None:
            said.append(f"owner changes are {share:.0%} of the advantage in layer output error")
    if summary["correlation"]:
        correlation = summary["correlation"]
        said.append(
            f"block errors' cosine {correlation['mean']:.3f}, highest pair {correlation['highest']:.3f}"
        )
    for family, combining in summary["combining"].items():
        if combining["comparable"]:
            said.append(
                f"{family} formats: of {combining['comparable']} joint orders {combining['decisively_better']} are "
                f"decisively better than single methods of the same bytes, {combining['decisively_worse']} worse"
            )
    for ranking in summary["rankings"]:
        last = ranking["ranking"][-1]
        gap = last["difference"]
        said.append(
            f"best {ranking['ranking'][0]['order']}, worst {last['order']}, {gap['mean']:+.3f} "
            f"[{gap['low']:+.3f}, {gap['high']:+.3f}] behind"
        )
    for entry in summary["orders"]:
        if "mixed_precision" in entry["order"] and entry["value"] is not None:
            said.append(f"{entry['order']}: {entry['value']:.4g}")
    return [f"{name}: {line}" for line in said]


def paired(on: Mapping[str, Any], off: Mapping[str, Any]) -> str:
    """The same pairs on the grid and off it: how often the better order is another one."""
    strip: Callable[[str], str] = lambda stage: str(
        canonical(Order((_on_grid(Order.parse(stage)[0]),)))
    )
    advantages = {(strip(p["first"]), strip(p["second"])): p["advantage"] for p in off["pairs"]}
    both = [
        (p["advantage"], advantages[key])
        for p in on["pairs"]
        if (key := (p["first"], p["second"])) in advantages
    ]
    decisive = [(a, b) for a, b in both if a["decisive"] and b["decisive"]]
    other = sum((a["mean"] > 0) != (b["mean"] > 0) for a, b in decisive)
    return f"{len(both)} pairs in both, {len(decisive)} decisive in both; of these {other} turn round off it"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("paper-output"))
    parser.add_argument("--planner", type=Path, default=Path("planner-output"))
    parser.add_argument(
        "--run",
        nargs="+",
        metavar=("STUDY", "DRAW"),
        help=f"one of {', '.join(STUDIES)}, with --model one of {', '.join(FINDINGS)}; and draws",
    )
    parser.add_argument("--store", action="store_true", help=f"write {STORED.name}")
    parser.add_argument("--model", help="a folder or an id")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--samples", type=int, default=64, help="of each calibration draw")
    parser.add_argument("--evaluation-samples", type=int, default=64)
    parser.add_argument("--length", type=int, help="tokens of a window")
    parser.add_argument("--pause", choices=PAUSES, default="block", help="where runs pause")
    parser.add_argument("--metric", default="auto")
    parser.add_argument("--workers", type=int, default=1, help="processes, with --run")
    parser.add_argument("--cluster", help="address of a Ray cluster, or auto, with --run")
    args = parser.parse_args()
    if args.run:
        torch.set_num_threads(1)
        name, *draws = args.run
        with quiet():
            numbers = [int(draw) for draw in draws] or list(range(DRAWS))
            if args.model:
                findings(name, args, numbers)
                return
            run(name, args.output / name, numbers, args.workers, args.cluster)
        return
    folders = {name: args.planner / name.replace(", ", "-").replace(" ", "-") for name in GRIDS}
    folders |= {folder.name: folder for folder in sorted(args.output.glob("*/"))}
    figures = {
        name: summarize(Trials.open(folder))
        for name, folder in folders.items()
        if (folder / TRIALS).exists()
    }
    console = Console(width=150, markup=False, highlight=False)
    console.print(signs(figures))
    for name, summary in figures.items():
        for line in sentences(name, summary):
            console.print(line)
        for one in choices(Trials.open(folders[name])):
            console.print(
                f"{name}: {one['order']}: to take the stronger first gains {one['mean']:+.4f} "
                f"({one['low']:+.4f} to {one['high']:+.4f})"
            )
    for name in [name for name in figures if figures[name]["rankings"]]:
        console.print(rankings(name, figures[name]))
        if gains := swaps(Trials.open(folders[name])):
            console.print(neighbors(name, gains))
    for name in [name for name in figures if name.endswith(ENDINGS)]:
        if figures[name]["pairs"]:
            console.print(pairs(name, figures[name]))
    for name in [name for name in GRIDS if name in figures and figures[name]["pairs"]]:
        console.print(by_setting(name, figures[name]))
    for name in [name for name in figures if f"{name}-off-grid" in figures]:
        console.print(
            f"{name} and {name}-off-grid: {paired(figures[name], figures[f'{name}-off-grid'])}"
        )
    if args.store:
        rows = {
            name: stored(summary, Trials.open(folders[name]))
            for name, summary in figures.items()
            if name.endswith(ENDINGS)
        }
        STORED.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    (args.output / "paper.json").write_text(json.dumps(figures, default=float) + "\n")


if __name__ == "__main__":
    main()
