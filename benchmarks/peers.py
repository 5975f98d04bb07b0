"""Ours beside llm-compressor: seconds, memory and perplexity of the same recipes on the same calibration tokens.

make peers
python benchmarks/peers.py --scaling

llm-compressor has needs of its own, so it lives in an environment of its own, `.venv-peers`. Every compression runs in
a fresh process, ours and theirs in turn, with the same number of threads. Speed is measured on a Llama of 88 million
random weights in float32, quality on tiny-llama.

Seconds are those of the compression alone: the libraries are imported, the model is in memory and the calibration text
is tokens before the clock starts, and it stops when the compressed model is in memory. For ours that is all of
`JointCompressor.compress` but reading the checkpoint, for theirs all of `oneshot`. Peak memory is what the process has
resident at most between those two moments, the interpreter and the libraries and the model included.

Both are used as their documentation does it, with the options they have by default: llm-compressor runs GPTQ and
SparseGPT with a damping of 0.01, blocks of 128 columns and activation order "static", one sequence at a time. Its joint
recipe is one sequential pipeline, which is its fastest; the pipeline it takes by default walks the model once for each
stage.

The floor of a recipe is the time of its floating-point operations alone, at the rate at which this machine multiplies
matrices: those of the forwards (each walk runs a block on all tokens twice, the last block once) and of X^T X (2 tokens
in^2, once for each distinct input). With --scaling, only ours is run, on models and calibration sets of four sizes, and
the exponents say how its time grows.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SAMPLES, LENGTH, VOCABULARY = 32, 512, 8192
LLAMA = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
}
DRAWS = 3
PRUNED = "-pruned"
SIZES = [(256, 4), (384, 6), (512, 9), (768, 12)]
"""Widths and numbers of layers."""
TOKENS = [8, 16, 32, 64]
"""Windows of so many tokens each."""


class Recipe(NamedTuple):
    """One row of the table.

    Args:
        order: Ours.
        schedule: Ours.
        pipeline: Theirs.
        target: What our seconds over theirs should come to at most, if anything.
        pause: Where our walk pauses, "group" or "block".
    """

    order: str
    schedule: str = "stage"
    pipeline: str = "sequential"
    target: float | None = None
    pause: str = "group"

    def __str__(self) -> str:
        joint = f", {self.schedule} / {self.pipeline}" if ">" in self.order else ""
        return f"{self.order}{joint}, pausing at {self.pause}s"


RECIPES = {
    "wanda": Recipe("wanda:0.5", target=0.33),
    "gptq": Recipe("gptq:4", target=0.42),
    "stage": Recipe("sparsegpt:0.5 > gptq:4", "stage", target=0.5),
    "block": Recipe("sparsegpt:0.5 > gptq:4", "block", target=0.32),
    "default": Recipe("sparsegpt:0.5 > gptq:4", "stage", "independent"),
}


# --- one compression, in a process of its own: `python peers.py --job JOB` ---


def memory(key: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is resident memory now, VmHWM at most."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{key}:"))


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """The front door, but with a model that is there already."""
    import torch

    import optimum_order
    from optimum_order import JointCompressor

    importlib.import_module("optimum_order.compressor")  # before memory is looked at

    torch.set_num_threads(job["threads"])
    result = {
        "imported": memory("VmRSS"),
        "versions": versions("torch", "transformers", "compressed-tensors"),
    }
    result["versions"]["optimum-order"] = optimum_order.__version__
    ids = tokens(job)
    compressor = JointCompressor.from_pretrained(
        job["model"],
        calibration=ids,
        calibration_samples=len(ids),
        sequence_length=ids.shape[1],
        device=job["device"],
    )
    model = compressor.source.load()
    compressor.source.load = lambda: model
    options = {"progress": False}
    if "pause" in inspect.signature(compressor.compress).parameters:  # 0.1.0 has none
        options["pause"] = job["pause"]
    drift = "" if job["drift"] is None else f", drift={job['drift']:g}"
    order = job["order"].replace("gptq:4", f"gptq(bits=4, group_size={job['group_size']}{drift})")
    order = order.replace("sparsegpt:0.5", f"sparsegpt(sparsity=0.5{drift})")
    with stopwatch(result, job):
        compressed = compressor.compress(order, job["schedule"], **options)
    if job["output"]:
        compressed.save_pretrained(job["output"], "dense")
    return result


def floor(job: dict[str, Any]) -> dict[str, Any]:
    """Operations that a recipe cannot do without, and how many this machine does in a second."""
    import torch

    from optimum_order import JointCompressor
    from optimum_order.estimate import rates

    torch.set_num_threads(job["threads"])
    device, ids = torch.device(job["device"]), tokens(job)
    compressor = JointCompressor.from_pretrained(
        job["model"],
        calibration=ids,
        calibration_samples=len(ids),
        sequence_length=ids.shape[1],
        device=job["device"],
    )
    steps = compressor.estimate(job["order"], job["schedule"]).steps
    width = compressor.source.config.hidden_size
    speed = {
        name: rates.products(device, getattr(torch, name), 4096, width)
        for name in ("float32", "bfloat16")
    }
    return speed | {
        part: sum(getattr(step, part) for step in steps) for part in ("forward", "gram")
    }


def theirs(job: dict[str, Any]) -> dict[str, Any]:
    """`oneshot`, with a model that is there already and a loader of tokens."""
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    result = {"imported": memory("VmRSS")}
    result["versions"] = versions("torch", "transformers", "compressed-tensors", "llmcompressor")
    pruned = {}

    class Remembering(SparseGPTModifier):
        def compress_modules(self):
            modules = list(self._num_samples)
            super().compress_modules()
            pruned.update({module: module.weight == 0 for module in modules})

    sparsegpt = Remembering if job["output"] else SparseGPTModifier
    modifiers = {
        "wanda:0.5": lambda: WandaPruningModifier(sparsity=0.5, ignore=["re:.*lm_head"]),
        "sparsegpt:0.5": lambda: sparsegpt(sparsity=0.5, ignore=["re:.*lm_head"]),
        "gptq:4": lambda: GPTQModifier(config_groups={"group_0": weights}, ignore=["lm_head"]),
    }
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    weights = preset_name_to_scheme("W4A16", targets=["Linear"])
    weights.weights.group_size = job["group_size"]
    loader = torch.utils.data.DataLoader([{"input_ids": row} for row in tokens(job)], batch_size=1)
    recipe = [modifiers[stage]() for stage in job["order"].split(" > ")]
    with stopwatch(result, job):
        oneshot(model=model, dataset=loader, recipe=recipe, pipeline=job["pipeline"])
    if job["output"]:
        save_dense(model, job["model"], job["output"])
    if job["output"] and len(recipe) > 1:
        for module, mask in pruned.items():
            module.weight.data[mask] = 0
        save_dense(model, job["model"], job["output"] + PRUNED)
    return result


def save_dense(model: Any, source: str, output: str) -> None:
    """The values that the model computes with, under the names its checkpoint has for them."""
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(source, output, ignore=shutil.ignore_patterns("*.safetensors"))
    file = "model.safetensors"
    with safe_open(Path(source) / file, framework="pt") as dense:
        shapes = {key: dense.get_slice(key).get_shape() for key in dense.keys()}  # noqa: SIM118 (no mapping)
    weights = model.state_dict()
    if any(list(weights[key].shape) != shape for key, shape in shapes.items()):
        raise SystemExit("llm-compressor left weights of another shape than they had")
    tensors = {key: weights[key].contiguous() for key in shapes}
    save_file(tensors, Path(output) / file, metadata={"format": "pt"})


class stopwatch:
    """Fills in what a block of code took."""

    def __init__(self, result: dict[str, Any], job: dict[str, Any]):
        self.found, self.cuda = result, job["device"].startswith("cuda")

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the most it had resident starts again from what it has now
        self.found["loaded"] = memory("VmRSS")
        self.usage, self.begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()

    def __exit__(self, *exception: Any) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            self.found["gpu"] = torch.cuda.max_memory_allocated()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.found["seconds"] = time.perf_counter() - self.begin
        self.found["processor"] = (
            usage.ru_utime + usage.ru_stime - self.usage.ru_utime - self.usage.ru_stime
        )
        self.found["peak"] = memory("VmHWM")


def tokens(job: dict[str, Any]) -> Any:
    """(samples, length) int64."""
    from safetensors.torch import load_file

    return load_file(job["tokens"])["ids"]


def versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


# --- all of them, in ours ---


class Bench:
    """Where the runs are, and what they have in common."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work, self.count = args, work, 0

    def run(
        self, side: str, recipe: Recipe, model: Path, ids: Path, output: Path | None = None
    ) -> dict[str, Any]:
        """One compression, "ours" or "theirs", and what it took; or its "floor"."""
        self.count += 1
        result = self.work / f"{self.count}.json"
        job = {
            "side": "ours" if self.args.before and side == "theirs" else side,
            **recipe._asdict(),
            "model": str(model),
            "tokens": str(ids),
            "output": output and str(output),
            "found": str(result),
            "threads": self.args.threads,
            "device": self.args.device,
            "group_size": group_size(model),
            "drift": self.args.drift,
        }
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(self.args.threads),
        }
        if self.args.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        python = self.args.theirs if side == "theirs" else sys.executable
        done = subprocess.run(
            [python, __file__, "--job", json.dumps(job)],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{side}, {recipe}: {done.stderr[-3000:]}")
        return json.loads(result.read_text())

    def pairs(
        self, recipes: list[Recipe], model: Path, ids: Path
    ) -> dict[Recipe, list[dict[str, Any]]]:
        """Ours and theirs in turn, each recipe as often as was asked for."""
        result: dict[Recipe, list[dict[str, Any]]] = {recipe: [] for recipe in recipes}
        for number in range(self.args.rounds):
            for recipe in recipes:
                pair = {side: self.run(side, recipe, model, ids) for side in ("ours", "theirs")}
                result[recipe].append(pair)
                mine, other = pair["ours"], pair["theirs"]
                print(
                    f"{recipe}, {number + 1} of {self.args.rounds}: {mine['seconds']:.1f} s over "
                    f"{other['seconds']:.1f} s, {mine['peak'] / 1e6:.0f} MB over {other['peak'] / 1e6:.0f} MB",
                    file=sys.stderr,
                    flush=True,
                )
        return result


def group_size(model: Path) -> int:
    """The largest group that divides the inputs of all layers: theirs refuses any other."""
    config = json.loads((model / "config.json").read_text())
    inputs = (config["hidden_size"], config["intermediate_size"])
    return next(size for size in (128, 64, 32) if not any(width % size for width in inputs))


def make_llama(folder: Path, sizes: dict[str, int], dtype: str) -> None:
    """A Llama of random weights, with a tokenizer because `oneshot` asks for one; its tokens are random as well."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from optimum_order import JointCompressor

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).to(getattr(torch, dtype)).save_pretrained(folder)
    JointCompressor.from_pretrained("tiny-llama").source.processor.save_pretrained(folder)


def save_ids(ids: Any, file: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"ids": ids.contiguous()}, file)
    return file


def speed(bench: Bench, recipes: list[Recipe]) -> None:
    """Print the table of seconds and memory."""
    import torch
    from rich.console import Console
    from rich.table import Table

    model = bench.args.model
    if model is None:
        model = bench.work / "llama"
        make_llama(model, LLAMA, "float32")
    config = json.loads((model / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype")
    samples = bench.args.samples
    drawn = torch.randint(
        0, config["vocab_size"], (samples, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    result = bench.pairs(recipes, model, save_ids(drawn, bench.work / "speed.safetensors"))
    table = Table(
        title=f"{model.name}, {weights(model) / 1e6:.0f} M weights in {dtype}, {samples} x {LENGTH} tokens"
    )
    table.add_column("recipe, our schedule / their pipeline", no_wrap=True)
    columns = (
        "seconds",
        "theirs",
        "ratio",
        "target",
        "processor seconds",
        "theirs",
        "peak MB",
        "theirs",
        "ratio",
    )
    for column in (*columns, "target"):
        table.add_column(column, justify="right")
    for recipe, pairs in result.items():
        for pair in pairs:
            mine, other = pair["ours"], pair["theirs"]
            table.add_row(
                str(recipe),
                f"{mine['seconds']:.1f}",
                f"{other['seconds']:.1f}",
                f"{mine['seconds'] / other['seconds']:.2f}",
                "" if recipe.target is None else f"{recipe.target:.1f}",
                f"{mine['processor']:.1f}",
                f"{other['processor']:.1f}",
                f"{mine['peak'] / 1e6:.0f}",
                f"{other['peak'] / 1e6:.0f}",
                f"{mine['peak'] / other['peak']:.2f}",
                "1.00",
            )
    Console(width=150).print(table)
    last = next(iter(result.values()))[-1]
    for side in ("ours", "theirs"):
        names = ", ".join(f"{name} {version}" for name, version in last[side]["versions"].items())
        resident = f"{last[side]['imported'] / 1e6:.0f} MB after the imports, {last[side]['loaded'] / 1e6:.0f} MB"
        print(f"{side}: {names}; {resident} with the model")
        if "gpu" in last[side]:
            print(f"{side}: {last[side]['gpu'] / 1e6:.0f} MB at most on the GPU")
    print(
        f"{bench.args.threads} threads, {bench.args.device}; a row is one pair of runs, ours first, then theirs."
    )
    above_floor(
        bench,
        model,
        {
            recipe: min(pair["ours"]["seconds"] for pair in pairs)
            for recipe, pairs in result.items()
        },
    )


def above_floor(bench: Bench, model: Path, seconds: dict[Recipe, float]) -> None:
    """Print the table of time over floor, for what `speed` has left in the work folder."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="ours over the floor", title_justify="left")
    table.add_column("recipe, our schedule", no_wrap=True)
    columns = ["forwards TFLOP", "X^T X TFLOP", "float32 GFLOP/s", "bfloat16 GFLOP/s", "seconds"]
    for column in (*columns, "floor in float32", "over it", "floor in bfloat16", "over it"):
        table.add_column(column, justify="right")
    done = set()
    for recipe, taken in seconds.items():
        if recipe[:2] in done:
            continue
        done.add(recipe[:2])
        result = bench.run("floor", recipe, model, bench.work / "speed.safetensors")
        row = [f"{result[part] / 1e12:.2f}" for part in ("forward", "gram")]
        row += [f"{result[dtype] / 1e9:.0f}" for dtype in ("float32", "bfloat16")] + [
            f"{taken:.1f}"
        ]
        for dtype in ("float32", "bfloat16"):
            least = (result["forward"] + result["gram"]) / result[dtype]
            row += [f"{least:.1f}", f"{taken / least:.2f}"]
        table.add_row(f"{recipe.order}, {recipe.schedule}", *row)
    Console(width=150).print(table)


def scaling(bench: Bench, recipe: Recipe) -> None:
    """Print how our time grows with the weights of the blocks and with the calibration tokens."""
    import torch
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "growing", title=f"{recipe.order}, schedule {recipe.schedule}", title_justify="left"
    )
    for column in ("weights in the blocks", "tokens", "seconds", "processor seconds"):
        table.add_column(column, justify="right")
    exponents = {}
    for growing, cases in {
        "weights": [(*size, 16) for size in SIZES],
        "tokens": [(512, 6, n) for n in TOKENS],
    }.items():
        points = []
        for width, layers, samples in cases:
            inner = round(width / 48) * 128  # 8/3, in whole groups
            sizes = LLAMA | {
                "hidden_size": width,
                "intermediate_size": inner,
                "num_hidden_layers": layers,
            }
            sizes |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 128}
            with tempfile.TemporaryDirectory(dir=bench.work) as folder:
                make_llama(Path(folder), sizes, "float32")
                ids = torch.randint(
                    0, VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(0)
                )
                file = save_ids(ids, Path(folder) / "ids.safetensors")
                runs = [
                    bench.run("ours", recipe, Path(folder), file) for _ in range(bench.args.rounds)
                ]
                inside = weights(Path(folder)) - 2 * width * VOCABULARY
            best = min(runs, key=lambda run: run["seconds"])
            points.append((inside if growing == "weights" else ids.numel(), best["seconds"]))
            row = [
                f"{inside:,}",
                f"{ids.numel():,}",
                f"{best['seconds']:.2f}",
                f"{best['processor']:.2f}",
            ]
            table.add_row(growing, *row)
            print(growing, *row, file=sys.stderr, flush=True)
        exponents[growing] = exponent(points)
    Console(width=150).print(table)
    for growing, result in exponents.items():
        print(f"seconds grow with {growing} to the power of {result:.2f} (target: at most 1.1)")


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of the straight line through points, both axes logarithmic."""
    import numpy as np

    return float(np.polyfit(*np.log(np.array(points, dtype=float).T), 1)[0])


def weights(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        shapes = (opened.get_slice(key).get_shape() for key in opened.keys())  # noqa: SIM118 (no mapping)
        return sum(product(shape) for shape in shapes)


def product(shape: list[int]) -> int:
    return shape[0] * product(shape[1:]) if shape else 1


def quality(bench: Bench, recipes: list[Recipe]) -> None:
    """Print the table of perplexities: what each draw of the calibration text makes of each recipe."""
    from rich.console import Console
    from rich.table import Table

    from optimum_order import JointCompressor
    from optimum_order.data.text import load

    original = JointCompressor.from_pretrained("tiny-llama")
    source = Path(original.source._path)
    drawn = load("builtin", original.source.processor, samples=SAMPLES * DRAWS, length=LENGTH).ids
    table = Table(
        title=f"tiny-llama, perplexity on builtin, {SAMPLES} x {LENGTH} tokens, {DRAWS} disjoint draws "
        f"(uncompressed: {original.evaluate(progress=False).value:.3f})"
    )
    table.add_column("recipe, our schedule / their pipeline", no_wrap=True)
    columns = (
        "ours",
        "theirs",
        "ratio",
        "target",
        "of each draw",
        "zeros",
        "theirs",
        "theirs pruned",
        "ratio",
    )
    for column in columns:
        table.add_column(column, justify="right")

    def measured(folder: Path) -> tuple[float, float]:
        result = JointCompressor.from_pretrained(folder)
        return result.evaluate("builtin", progress=False).value, zeros(result)

    for recipe in recipes:
        result: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": [], "pruned": []}
        for draw, ids in enumerate(drawn.split(SAMPLES)):
            file = save_ids(ids, bench.work / f"quality{draw}.safetensors")
            for side in ("ours", "theirs"):
                with tempfile.TemporaryDirectory(dir=bench.work) as folder:
                    output = Path(folder) / "model"
                    bench.run(side, recipe, source, file, output)
                    result[side].append(measured(output))
                    if output.with_name(output.name + PRUNED).exists():
                        result["pruned"].append(measured(output.with_name(output.name + PRUNED)))
        (mine, is_kept), (other, left), *rest = (
            [statistics.mean(part) for part in zip(*entry, strict=True)]
            for entry in result.values()
            if entry
        )
        ratios = [
            f"{a[0] / b[0]:.3f}" for a, b in zip(result["ours"], result["theirs"], strict=True)
        ]
        row = [
            f"{mine:.3f}",
            f"{other:.3f}",
            f"{mine / other:.4f}",
            "1.00",
            " ".join(ratios),
            f"{is_kept:.1%}",
        ]
        row += [
            f"{left:.1%}",
            *(f"{value:.3f}" for value, _ in rest),
            *(f"{mine / value:.4f}" for value, _ in rest),
        ]
        table.add_row(str(recipe), *row)
        print(recipe, *row, file=sys.stderr, flush=True)
    Console(width=150).print(table)
    print(
        "zeros: of the weights of the blocks. Rounding makes zeros of its own, of nothing that was pruned."
    )
    print(
        "theirs pruned: their result with what SparseGPT had pruned put back to zero. Their GPTQ moves such weights "
        "on, and what comes out is no longer pruned."
    )


def zeros(compressor: Any) -> float:
    """The share of zeros in a model's blocks."""
    from optimum_order.models.units import find_units

    views = [
        target.view for unit in find_units(compressor.source.load()) for target in unit.targets
    ]
    return sum(int((view == 0).sum()) for view in views) / sum(view.numel() for view in views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--theirs",
        default=ROOT / ".venv-peers/bin/python",
        help="the Python that has llm-compressor",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=2, help="pairs of runs for each recipe (default %(default)s)"
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument(
        "--parts", nargs="+", choices=("speed", "quality"), default=["speed", "quality"]
    )
    parser.add_argument(
        "--scaling", action="store_true", help="how our time grows, and nothing else"
    )
    parser.add_argument(
        "--model", type=Path, help="folder of the model for speed (default: random weights)"
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="for speed")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument(
        "--pause", choices=("group", "block"), default="group", help="where our walk pauses"
    )
    parser.add_argument(
        "--drift",
        type=float,
        help="of our gptq and sparsegpt; 0 is what theirs does, and half of the work",
    )
    parser.add_argument(
        "--before",
        help="the Python of an earlier version of ours, which then stands in the columns of theirs",
    )
    args = parser.parse_args()
    args.theirs = args.before or args.theirs
    if args.job:
        job = json.loads(args.job)
        Path(job["found"]).write_text(
            json.dumps({"ours": ours, "theirs": theirs, "floor": floor}[job["side"]](job))
        )
        return
    if not args.scaling and not Path(args.theirs).exists():
        raise SystemExit(f"There is no {args.theirs}: 'make peers' makes it.")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        recipes = [RECIPES[name]._replace(pause=args.pause) for name in args.recipes]
        if args.scaling:
            scaling(bench, RECIPES["stage"])
            return
        for part in args.parts:
            {"speed": speed, "quality": quality}[part](bench, recipes)


if __name__ == "__main__":
    main()
