"""How good is the planner? Its choices against the truth: all orders in full, with three calibration draws.

    python benchmarks/planner.py --output planner-output            (hours on two cores; goes on where it was stopped)
    python benchmarks/planner.py --output planner-output --only truth tiny-llama 1    (one part, for a second process)
    python benchmarks/planner.py --output planner-output --only curve tiny-vit        (accuracy against cost)
    python benchmarks/planner.py --study paper-output/minilm-pairs --model minilm --length 128 --samples 64
                                  (on the pairs of a study of benchmarks/paper.py, which nothing here was tuned on)

The truth of a pair is its order advantage, the mean over three disjoint calibration draws; a pair is decisive where the
95 % interval over draws and samples together excludes 0. The planner sees neither those calibration draws nor the
samples the truth is measured on.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from optimum_order import JointCompressor, Order, Stage
from optimum_order.engine.recipe import canonical
from optimum_order.engine.runner import Runner
from optimum_order.evaluation.accuracy import Accuracy
from optimum_order.evaluation.comparison import difference_over_draws
from optimum_order.evaluation.fidelity import Fidelity
from optimum_order.evaluation.perplexity import Perplexity
from optimum_order.search.intervals import WIDENING, conformal
from optimum_order.search.plan import Plan
from optimum_order.search.planner import plan
from optimum_order.search.strategies.base import USUAL, Effort, Scoring
from optimum_order.study.grid import grid
from optimum_order.study.run import Study, quiet
from optimum_order.study.trials import ORIGINAL, Trials
from optimum_order.study.worker import Worker

DRAWS = 3
STORED = Path(__file__).with_name("plans.json")
PRUNERS, QUANTIZERS = (
    [Stage("magnitude"), Stage("wanda"), Stage("sparsegpt")],
    [Stage("rtn"), Stage("gptq")],
)
TRIPLE = "wanda:0.4 > gptq:4 > magnitude:0.55"
GRIDS = {
    "tiny-llama": grid(PRUNERS, [0.3, 0.5, 0.65], QUANTIZERS, [2, 3, 4]),
    "tiny-llama, three stages": list(Order.parse(TRIPLE).permutations()),
    "tiny-llama, one sparsity": grid(PRUNERS, [0.5], [Stage("gptq")], [2, 3, 4]),
    "tiny-vit": grid(PRUNERS, [0.4, 0.6], QUANTIZERS, [2, 3]),
    "tiny-resnet": grid(PRUNERS, [0.3, 0.5], QUANTIZERS, [3, 4]),
}
VARIANTS = [("auto", USUAL.confidence), ("proxy", USUAL.confidence)]
CONFIDENCES = [0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0]
"""Of `auto`: from looking twice as seldom as can be to always scoring whole models."""


class Setting:
    """One model, the data of the truth, and other data for the planner."""

    def __init__(self, name: str):
        vision = not name.startswith("tiny-llama")
        self.size = 128 if vision else 64
        needed = self.size * (DRAWS + 1)
        compressor = JointCompressor.from_pretrained(
            name.split(",")[0],
            calibration="builtin",
            calibration_samples=897 if vision else needed,
        )
        held_out, drawn = compressor.evaluation_samples("builtin"), compressor.draw()
        self.settings = {"source": "builtin", "samples": self.size, "seed": 0}
        if vision:
            self.truth_samples, self.metric = held_out, Accuracy()
            # held-out images are all in the truth, so the planner scores on training images nobody calibrates with
            self.plan_samples = drawn.take(torch.arange(needed, len(drawn)))
            self.scorer = Fidelity(compressor.source.load())
        else:
            self.settings["sequence_length"] = compressor.sequence_length
            self.truth_samples, self.plan_samples = (
                held_out.take(torch.arange(first, 256, 4)) for first in (0, 2)
            )
            self.metric, self.scorer = Perplexity(), None

        def batches(draw: int, samples: int | None = None) -> list:
            first = draw * self.size
            return drawn.take(torch.arange(first, first + (samples or self.size))).inputs()

        self.runner = Runner(compressor.source, batches)
        self.planning = Runner(compressor.source, lambda draw, samples: batches(DRAWS, samples))

    def plan(self, stages: Sequence[Stage], strategy: str, confidence: float) -> Plan:
        scoring = Scoring(self.metric, self.plan_samples, self.scorer)
        return plan(
            self.planning, stages, scoring, strategy, Effort(self.size, confidence=confidence)
        )

    def study(self, folder: Path) -> Study:
        return Study(
            self.runner,
            self.metric,
            self.truth_samples,
            folder,
            settings={"calibration": self.settings},
        )


def worker(name: str) -> Worker:
    """Return a worker on a copy of a model, in whichever process it is to work."""
    with quiet():
        setting = Setting(name)
        return Worker(setting.runner, setting.metric, setting.truth_samples)


class HeldBack(Setting):
    """The model of a study, and for the planner a calibration draw and windows that the study has not seen."""

    def __init__(self, args: argparse.Namespace):
        self.size = args.samples
        compressor = JointCompressor.from_pretrained(
            args.model,
            calibration=args.calibration,
            calibration_samples=args.samples,
            sequence_length=args.length,
        )
        self.planning = Runner(
            compressor.source,
            lambda draw, samples: compressor.draw(args.draw, samples).inputs(),
        )
        self.metric = compressor.metric(self.planning.model, args.metric)
        # windows are taken from all over the text, so that every fourth of four times as many is one of the study's
        many = compressor.evaluation_samples(args.evaluation, 4 * args.evaluation_samples)
        self.plan_samples = many.take(torch.arange(2, len(many), 4))
        self.scorer = None


def pairs(truth: Truth) -> list[list[Order]]:
    """The pairs of a study, both orders in full."""
    orders = {Order.parse(order) for order, _ in truth.rows if order != ORIGINAL}
    both = {frozenset(order): sorted(order.permutations(), key=str) for order in orders}
    whole = [pair for pair in both.values() if len(pair) == 2 and orders.issuperset(pair)]
    return sorted(whole, key=str)


def truth(name: str, folder: Path, draws: list[int]) -> None:
    Setting(name).study(folder).run(GRIDS[name], draws)


def groups(name: str) -> list[list[Order]]:
    """The orders to choose among: pairs, or all permutations."""
    orders = [canonical(order) for order in GRIDS[name] if len(order) > 1]
    return (
        [orders]
        if len(orders[0]) > 2
        else [list(pair) for pair in zip(orders[::2], orders[1::2], strict=True)]
    )


def plans(
    setting: Callable[[], Setting],
    groups: list[list[Order]],
    file: Path,
    variants: list[tuple[str, float]],
) -> None:
    """Ask the planner about every group, one JSON line each; those in the file are left out.

    Args:
        setting: What the planner works with.
        groups: The orders of each.
        file: Where the lines go.
        variants: Strategies, each with the confidence that `auto` asks for.
    """
    done = {(row["index"], row["plan"]["strategy"], row["confidence"]) for row in lines(file)}
    planner = setting()
    with file.open("a") as out:
        for index, orders in enumerate(groups):
            for strategy, confidence in variants:
                if (index, strategy, confidence) in done:
                    continue
                result = planner.plan(orders[0].stages, strategy, confidence)
                row = {"index": index, "confidence": confidence, "plan": result.as_dict()}
                out.write(json.dumps(row) + "\n")
                out.flush()


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.open()] if file.exists() else []


class Truth:
    """What the trials say of every order."""

    def __init__(self, folder: Path):
        self.rows = Trials.open(folder).rows("trials")

    def draws(self, order: Order) -> np.ndarray:
        """M of each sample with each draw, (draws, samples); one row where the draw does not matter."""
        result = [
            self.rows[str(order), draw]["performances"]
            for draw in range(DRAWS)
            if (str(order), draw) in self.rows
        ]
        return np.array(result)

    def cost(self, order: Order) -> float:
        """Processor seconds of running an order once in full and measuring it."""
        row = self.rows[str(order), 0]
        return sum(row["cpu_seconds"]) + row["measure_cpu_seconds"]

    def alone(self, stage: Stage) -> float:
        return float(self.draws(Order((stage,))).mean())


def choices(
    truth: Truth, orders: list[Order], result: dict[str, dict]
) -> dict[str, tuple[Order, float]]:
    """What each strategy chooses, and its processor seconds."""
    alone = {stage: truth.alone(stage) for stage in orders[0]}
    chosen = {
        name: (Order.parse(entry["order"]), entry["cost"]["cpu_seconds"])
        for name, entry in result.items()
    }
    pruners = {"magnitude", "wanda", "sparsegpt"}
    weaker = sorted(orders[0], key=lambda stage: -alone[stage])
    chosen["pih"] = (Order(weaker), sum(truth.cost(Order((stage,))) for stage in orders[0]))
    chosen["prune first"] = (
        Order(sorted(orders[0], key=lambda stage: stage.method not in pruners)),
        0.0,
    )
    return chosen


def table(
    name: str, groups: list[list[Order]], truth: Truth, rows: list[dict]
) -> tuple[Table, dict]:
    strategies = ["auto", "proxy", "pih", "prune first", "one full run"]
    totals: dict[tuple[str, str], list[tuple[bool | None, float, float, float]]] = {}
    claims: dict[str, list[tuple[bool, bool, bool, float, float]]] = {}
    gaps: dict[str, list[float]] = {}
    decisive_count: dict[str, int] = {}
    for index, orders in enumerate(groups):
        if any((str(order), 0) not in truth.rows for order in orders):
            continue  # the truth is still being run
        half = ("even" if index % 2 == 0 else "odd") if name == "tiny-llama" else "all"
        result = {row["plan"]["strategy"]: row["plan"] for row in rows if row["index"] == index}
        means = {order: truth.draws(order).mean() for order in orders}
        best, worst = max(means, key=means.get), min(means, key=means.get)
        count = min(
            len(truth.draws(order)) for order in orders
        )  # fewer while the truth is still being run
        values = torch.from_numpy(truth.draws(best)[:count] - truth.draws(worst)[:count])
        decisive = difference_over_draws(values).decisive
        decisive_count[half] = decisive_count.get(half, 0) + decisive
        gaps.setdefault(half, []).append(means[best] - means[worst])
        full = sum(map(truth.cost, orders))
        if "auto" in result:
            claims.setdefault(half, []).append(claim(result["auto"], truth, best))
        for strategy, (order, cost) in choices(truth, orders, result).items():
            right = (order == best) if decisive else None
            totals.setdefault((half, strategy), []).append(
                (right, means[best] - means[order], cost, full)
            )
        if len(values) > 1:  # one draw against the mean of the others
            for draw in range(len(values)):
                rest = [d for d in range(len(values)) if d != draw]
                judged = {order: truth.draws(order)[rest].mean() for order in orders}
                pick = max(orders, key=lambda order: truth.draws(order)[draw].mean())
                top = max(judged, key=judged.get)
                row = ((pick == top) if decisive else None, judged[top] - judged[pick], full, full)
                totals.setdefault((half, "one full run"), []).append(row)
    shown = Table(title=name, title_justify="left")
    for column in (
        "pairs",
        "strategy",
        "right where decisive",
        "regret / mean |A|",
        "cost / all orders in full",
    ):
        shown.add_column(column, justify="left" if column in ("pairs", "strategy") else "right")
    summary = {}
    for half, strategy in itertools.product(gaps, strategies):
        if (half, strategy) not in totals:
            continue
        result = totals[half, strategy]
        judged = [right for right, *_ in result if right is not None]
        regret = np.mean([lost for _, lost, _, _ in result]) / np.mean(gaps[half])
        cost = sum(c for *_, c, _ in result) / sum(f for *_, f in result)
        share = f"{sum(judged)} of {len(judged)}" + (
            f" ({sum(judged) / len(judged):.0%})" if judged else ""
        )
        label = f"{half}: {len(gaps[half])}, {decisive_count[half]} decisive"
        shown.add_row(label, strategy, share, f"{regret:.3f}", f"{cost:.1%}")
        summary[f"{half}/{strategy}"] = {"right": share, "regret": regret, "cost": cost}
    for half, made in claims.items():
        said = [right for decisive, right, *_ in made if decisive]
        expected, true = np.array([(e, t) for *_, e, t in made]).T
        summary[f"{half}/claims of auto"] = {
            "plans": len(made),
            "called decisive": len(said),
            "of those right": sum(said),
            "intervals that hold the true difference": sum(held for _, _, held, *_ in made),
            "expected over true difference": float(expected.sum() / np.abs(true).sum()),
        }
    summary["mean |A|"] = {half: float(np.mean(values)) for half, values in gaps.items()}
    return shown, summary


def claim(result: dict, truth: Truth, best: Order) -> tuple[bool, bool, bool, float, float]:
    """Of a plan: called decisive, right, whether its interval holds the true difference to the next, and both."""
    first, second = (Order.parse(row["order"]) for row in result["ranking"][:2])
    true, gap = float(truth.draws(first).mean() - truth.draws(second).mean()), result["difference"]
    return result["decisive"], first == best, gap["low"] <= true <= gap["high"], gap["mean"], true


def intervals(name: str, truth: Truth, rows: list[dict]) -> list[dict]:
    """Of every plan by `auto`: its middle, its half-width before widening, and the truth."""
    result = []
    for row in rows:
        entry = row["plan"]
        first, second = (Order.parse(line["order"]) for line in entry["ranking"][:2])
        if entry["strategy"] != "auto" or any(
            (str(order), 0) not in truth.rows for order in (first, second)
        ):
            continue
        gap = entry["difference"]
        ranked_by = "M by a finer metric" if entry["metric"] == "accuracy" else "M"
        half = (gap["high"] - gap["low"]) / 2 / WIDENING[ranked_by]
        true = float(truth.draws(first).mean() - truth.draws(second).mean())
        result.append(
            {"model": name, "pair": row["index"], "ranked_by": ranked_by}
            | {
                key: round(value, 5)
                for key, value in (("mean", gap["mean"]), ("half", half), ("true", true))
            }
        )
    return result


def curve(name: str, truth: Truth, rows: list[dict], picture: Path) -> tuple[Table, dict]:
    """What `auto` would be with other confidences, with the rules beside it: accuracy and regret against cost."""
    shown = Table(title=f"{name}: accuracy against cost", title_justify="left")
    for column in (
        "confidence",
        "right where decisive",
        "regret / mean |A|",
        "cost",
        "layers looked at",
        "of them whole",
    ):
        shown.add_column(column, justify="right")
    result: dict[str, dict] = {}
    for confidence in CONFIDENCES:
        mine = [row for row in rows if row["confidence"] == confidence]
        _, summary = table(name, groups(name), truth, mine)
        halves = [value for key, value in summary.items() if key.endswith("/auto")]
        if not halves:
            continue
        right, decisive = (sum(int(half["right"].split()[i]) for half in halves) for i in (0, 2))
        regret, cost = (np.mean([half[key] for half in halves]) for key in ("regret", "cost"))
        layers = np.mean([row["plan"]["cost"].get("layers", 0) for row in mine])
        whole = np.mean([row["plan"]["scored_by"] != "layer error" for row in mine])
        shown.add_row(
            f"{confidence:g}",
            f"{right} of {decisive}",
            f"{regret:.3f}",
            f"{cost:.1%}",
            f"{layers:.1f}",
            f"{whole:.0%}",
        )
        result[f"{confidence:g}"] = {
            "right": right,
            "decisive": decisive,
            "regret": regret,
            "cost": cost,
        }
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right_ = figure.subplots(1, 2)
    for axis, key, label, target in (
        (left, "right", "right where decisive", 0.95),
        (right_, "regret", "regret", 0.03),
    ):
        values = [
            entry[key] / (entry["decisive"] if key == "right" else 1) for entry in result.values()
        ]
        costs = [entry["cost"] for entry in result.values()]
        axis.plot(costs, values, "o-")
        points: list[
            tuple[list[str], float, float]
        ] = []  # those that lie on each other have one label
        for confidence, x, y in zip(result, costs, values, strict=True):
            if points and points[-1][2] == y and abs(points[-1][1] - x) < 0.05:
                points[-1][0].append(confidence)
            else:
                points.append(([confidence], x, y))
        for names, x, y in points:
            text = " to ".join(dict.fromkeys((names[0], names[-1])))
            axis.annotate(text, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
        axis.axhline(target, color="grey", linestyle=":")
        axis.axvline(0.15, color="grey", linestyle=":")
        axis.set(xlabel="cost / all orders in full", ylabel=label, xlim=(0, None))
    figure.suptitle(f"{name}: auto at other confidences; dotted are the targets")
    figure.savefig(picture, dpi=120)
    return shown, result


def held_back(args: argparse.Namespace) -> None:
    """Plan every pair of a study, and compare the plans with the study."""
    truth = Truth(args.study)
    chosen = pairs(truth)
    file = args.output / f"{args.study.name}.jsonl"
    args.output.mkdir(parents=True, exist_ok=True)
    with quiet():
        plans(functools.partial(HeldBack, args), chosen, file, VARIANTS)
    shown, summary = table(args.study.name, chosen, truth, lines(file))
    Console(width=110).print(shown)
    for key, value in summary.items():
        if key.endswith("claims of auto"):
            print(", ".join(f"{what} {number:g}" for what, number in value.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("planner-output"))
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PART",
        help="'truth NAME DRAW', 'plans NAME', 'curve NAME', 'table' or 'intervals'",
    )
    parser.add_argument("--study", type=Path, help="folder of a study")
    parser.add_argument("--model", help="of that study")
    parser.add_argument("--calibration", default="builtin", help="of that study")
    parser.add_argument("--evaluation", default="builtin", help="of that study")
    parser.add_argument("--samples", type=int, default=64, help="of that study, in a draw")
    parser.add_argument("--evaluation-samples", type=int, default=64, help="of that study")
    parser.add_argument("--length", type=int, help="of that study")
    parser.add_argument("--metric", default="auto", help="of that study")
    parser.add_argument(
        "--draw", type=int, default=DRAWS, help="of the planner; the study has those before"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that processor seconds are those of the work
    if args.study:
        held_back(args)
        return
    part, *rest = args.only or [""]
    with quiet():
        for name in GRIDS:
            folder = args.output / name.replace(", ", "-").replace(" ", "-")
            if part in ("", "truth") and (not rest or rest[0] == name):
                truth(name, folder, [int(rest[1])] if len(rest) > 1 else list(range(DRAWS)))
            if part in ("", "plans") and (not rest or rest[0] == name):
                plans(
                    functools.partial(Setting, name), groups(name), folder / "plans.jsonl", VARIANTS
                )
            if part in ("", "curve") and (not rest or rest[0] == name):
                plans(
                    functools.partial(Setting, name),
                    groups(name),
                    folder / "curve.jsonl",
                    [("auto", confidence) for confidence in CONFIDENCES],
                )
    if part == "intervals":
        made = []
        for name in GRIDS:
            folder = args.output / name.replace(", ", "-").replace(" ", "-")
            if rows := lines(folder / "plans.jsonl"):
                made += intervals(name, Truth(folder), rows)
        for kind in WIDENING:
            ratios = [
                abs(row["true"] - row["mean"]) / row["half"]
                for row in made
                if row["ranked_by"] == kind
            ]
            held = sum(ratio <= 1 for ratio in ratios)
            print(
                f"{kind}: {held} of {len(ratios)} hold the truth; widen by {conformal(ratios):.2f}"
            )
        STORED.write_text("[\n" + ",\n".join(map(json.dumps, made)) + "\n]\n")
    if part in ("", "table", "curve"):
        console, everything = Console(width=110), {}
        for name in GRIDS:
            folder = args.output / name.replace(", ", "-").replace(" ", "-")
            if part != "curve" and (rows := lines(folder / "plans.jsonl")):
                shown, everything[name] = table(name, groups(name), Truth(folder), rows)
                console.print(shown)
                for key, value in everything[name].items():
                    if key.endswith("claims of auto"):
                        console.print(
                            f"{key}: "
                            + ", ".join(f"{what} {number:g}" for what, number in value.items())
                        )
            if rows := lines(folder / "curve.jsonl"):
                shown, result = curve(name, Truth(folder), rows, folder / "curve.png")
                console.print(shown)
                everything[f"{name}, curve"] = result
        (args.output / "planner.json").write_text(
            json.dumps(everything, indent=2, default=float) + "\n"
        )


if __name__ == "__main__":
    main()
