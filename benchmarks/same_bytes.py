"""Compare the artifacts of the working tree with those of an earlier version, bit by bit.

python benchmarks/same_bytes.py
python benchmarks/same_bytes.py --only "gpt2-*" --refresh

The earlier version (0.1.0, or `--baseline COMMIT`) is taken from git and installed without
dependencies into a virtual environment of its own, which borrows the dependencies of the
environment that runs this script. Both versions export the cases below from the same models with
the same seeds, on one thread of the CPU, each in a fresh process. The artifacts of the earlier
version are cached in that environment's folder; a later run only exports the working tree, unless
a case, a dependency or the processor has changed.

Compared are every tensor of every safetensors file (name, dtype, shape, bytes), the
`quantization_config` of config.json, and what the manifest says of each layer. The exit code is 1
if anything differs that `EXPECTED` does not list.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_ONE_METHOD = "every encoding of ours is the one method `optimum_order`"
_SUFFIXES = "layers are named by patterns that hold under any head"
EXPECTED: dict[str, str] = {
    "*/quantization_config/quant_method": _ONE_METHOD,
    "*/quantization_config/encoding": _ONE_METHOD,
    "*/quantization_config/dequantize": "folders of one width load as dense models",
    "*/quantization_config/config_groups/*/targets": _SUFFIXES,
    "*/quantization_config/ignore": _SUFFIXES,
}
"""Deliberate changes: shell pattern of a difference's name -> reason.

A difference is named as this script prints it: `CASE/tensors/NAME`,
`CASE/quantization_config/PATH`, `CASE/manifest/PATH`, or `CASE/export` where the export fails.
"""

TREE_OPTIONS: dict[str, Any] = {"pause": "block"}
"""Arguments that the working tree's `compress` needs to do what the earlier version did."""

PACKAGE = "optimum_order"
ROOT = Path(__file__).resolve().parent.parent
BASELINE = "f54ff51"
"""The commit of 0.1.0."""
SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"
SETTINGS = {
    "calibration": "ids",
    "calibration_samples": 8,
    "sequence_length": 32,
    "seed": 0,
    "device": "cpu",
    "calibration_dtype": "float32",
}
"""Arguments of `JointCompressor.from_pretrained`; "ids" are random ids, no text to read."""
VERSIONS = """
import importlib.metadata, optimum_order
print(optimum_order.__version__, importlib.metadata.version("optimum-order"))
"""
LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "compressed-tensors",
    "numpy",
    "optimum",
    "pillow",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
)
"""Packages whose version may change the bytes of an artifact."""
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
LAYER_FACTS = (
    "shape",
    "bits",
    "group_size",
    "sparsity",
    "pruned",
    "pattern",
    "digest",
    "stored",
    "stages",
)
"""What a manifest says of a layer and both versions must say alike."""

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS: dict[str, tuple[str, dict[str, int]]] = {
    "bert": ("AutoModelForMaskedLM", _SMALL),
    "gpt2": ("AutoModelForCausalLM", _GPT2),
    "mixtral": ("AutoModelForCausalLM", _SMALL | _EXPERTS),
}
"""Models of random weights: the auto class and the configuration by model type."""


def case(
    name: str,
    order: str,
    format: str = "auto",
    schedule: str = "stage",
    *,
    run: str = "api",
    **options: Any,
) -> tuple[str, dict[str, Any]]:
    """Return one case: its name, which begins with the model's, and its description.

    Args:
        name: Such as "llama-gptq".
        order: The stages.
        format: The format to save in.
        schedule: "stage" or "block".
        run: "api", "cli", or "cut" for a run that is killed and resumed.
        options: `low_memory`, and arguments of `JointCompressor.from_pretrained` other than
            those in `SETTINGS`.
    """
    model = name.partition("-")[0]
    low_memory = options.pop("low_memory", False)
    if model in ("vit", "resnet"):
        options["calibration"] = "builtin"
    return name, {
        "model": model if model in CONFIGS else f"tiny-{model}",
        "order": order,
        "format": format,
        "schedule": schedule,
        "run": run,
        "low_memory": low_memory,
        "options": SETTINGS | options,
    }


_JOINT = "sparsegpt:0.5 > gptq:4"
_ZERO_POINTS = "bits=3, group_size=64, symmetric=false, clip=none"
_ROWS = "bits=8, group_size=-1, act_order=false"
_NESTED = "dtype=fp4, blocksize=128, double_quant=true"
_WEAKER = "bits=3, widths=[2, 4], quantizer=rtn, fuse=false, first=weaker"
_MEASURED = "wanda:0.5 > mixed_precision(bits=3, widths=[2, 4], quantizer=rtn)"
_ATTENTION = ["*.q_proj", "*.k_proj", "*.v_proj", "*.o_proj"]

CASES: dict[str, dict[str, Any]] = dict(
    [
        case("llama-magnitude", "magnitude:0.5", "dense"),
        case("llama-magnitude-rows", "magnitude(sparsity=0.6, per=row)", "sparse"),
        case("llama-wanda", "wanda:0.5", "sparse"),
        case("llama-wanda-2:4", "wanda(pattern=2:4)", "sparse"),
        case("llama-sparsegpt", "sparsegpt:0.5", "dense"),
        case("llama-sparsegpt-4:8", "sparsegpt(pattern=4:8)", "sparse", dtype="float32"),
        case("llama-rtn", "rtn:4", "compressed-tensors"),
        case("llama-rtn-zero-points", f"rtn({_ZERO_POINTS})", "sparse"),
        case("llama-gptq", "gptq:4", "gptq"),
        case("llama-gptq-rows", f"gptq({_ROWS})", "compressed-tensors"),
        case("llama-gptq-3", "gptq(bits=3, group_size=64)", "sparse", dtype="float32"),
        case("llama-nf4", "bitsandbytes:nf4", "bitsandbytes"),
        case("llama-fp4", f"bitsandbytes({_NESTED})", "bitsandbytes"),
        case("llama-int8", "bitsandbytes:int8", "bitsandbytes"),
        case("llama-nf4-dense", "bitsandbytes:nf4", "dense", dtype="float32"),
        case("llama-mixed", "mixed_precision(bits=4, widths=[3, 4])", "compressed-tensors"),
        case("llama-mixed-rtn", f"mixed_precision({_WEAKER})", "sparse"),
        case("llama-joint", _JOINT, "compressed-tensors"),
        case("llama-joint-block", _JOINT, "compressed-tensors", "block"),
        case("llama-reversed", "gptq:4 > sparsegpt:0.5", "sparse"),
        case("llama-reversed-block", "gptq:4 > wanda(pattern=2:4)", "gptq", "block"),
        case("llama-off-grid", "gptq:4 > wanda(sparsity=0.5, off_grid=true)", "dense"),
        case("llama-wanda-nf4-block", "wanda:0.5 > bitsandbytes:nf4", "bitsandbytes", "block"),
        case("llama-three-stages", "magnitude:0.3 > wanda:0.5 > gptq:4", "sparse", dtype="float32"),
        case("llama-attention", _JOINT, "sparse", targets=_ATTENTION, ignore=["*.0.*"]),
        case("llama-low-memory", _JOINT, "compressed-tensors", low_memory=True),
        case(
            "llama-mixed-block", _MEASURED, "sparse", "block", low_memory=True, targets=_ATTENTION
        ),
        case("llama-cut", _JOINT, "sparse", run="cut"),
        case("llama-cut-low-memory", _JOINT, "gptq", "block", run="cut", low_memory=True),
        case("llama-cli", "wanda:0.5 > gptq:4", run="cli", calibration="builtin"),
        case("vit-joint-block", "wanda:0.5 > gptq:4", "sparse", "block"),
        case("vit-gptq", "gptq:4", "compressed-tensors"),
        case("vit-int8", "bitsandbytes:int8", "bitsandbytes"),
        case("resnet-joint", "sparsegpt:0.5 > rtn:4", "sparse"),
        case("resnet-wanda", "wanda:0.5", "dense"),
        case("gpt2-joint", _JOINT, "sparse"),
        case("gpt2-nf4", "bitsandbytes:nf4", "bitsandbytes"),
        case("mixtral-joint", "wanda:0.5 > gptq:4", "sparse", low_memory=True),
        case("mixtral-mixed", "mixed_precision:4", "compressed-tensors"),
        case("bert-joint-block", "gptq:8 > magnitude:0.5", "compressed-tensors", "block"),
    ]
)


# ---- what runs in a process of its own, with either version


def work(job: Mapping[str, Any]) -> None:
    """Export cases with the one version of the package that this process can import.

    Args:
        job: `tree`, a folder to import the package from, or None; `inside`, the folder it must come
            from; the folders `models` and `output`; the `cases`; the `options` for `compress`.
    """
    if job["tree"] is not None:
        sys.path.insert(0, job["tree"])
    import optimum_order

    imported = Path(optimum_order.__file__).resolve()
    if not imported.is_relative_to(job["inside"]):
        raise SystemExit(f"Imported '{imported}', which is not inside '{job['inside']}'.")
    import torch

    torch.set_num_threads(1)
    models = Path(job["models"])
    output = Path(job["output"])
    make_models(models)
    for name, description in job["cases"].items():
        begin = time.perf_counter()
        folder = output / name
        file = folder.with_name(f"{name}.json")
        file.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(work_dir(folder), ignore_errors=True)
        torch.manual_seed(0)
        record = {"case": description, "error": None}
        try:
            export(description, folder, models, job["options"])
        except (Exception, SystemExit) as error:  # another case may still go well
            traceback.print_exc()
            record["error"] = f"{type(error).__name__}: {error}"
        record["seconds"] = round(time.perf_counter() - begin, 2)
        file.write_text(json.dumps(record), encoding="utf-8")
        print(f"  {name}: {record['error'] or str(record['seconds']) + ' s'}", flush=True)


def make_models(folder: Path) -> None:
    """Save the models of random weights that the folder lacks.

    Weights, biases and norms are all large enough to matter.
    """
    import torch
    import transformers

    for name, (auto, options) in CONFIGS.items():
        if (folder / name).exists():
            continue
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **options)
        model = getattr(transformers, auto).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
        model.save_pretrained(folder / f".{name}")
        (folder / f".{name}").rename(folder / name)


def export(
    description: Mapping[str, Any], folder: Path, models: Path, more: Mapping[str, Any]
) -> None:
    """Export one case to a folder, by the public API or the command line."""
    if description["run"] == "cli":
        export_by_command(description, folder, more)
        return
    options = dict(more)
    if description["low_memory"] or description["run"] == "cut":
        options["work_dir"] = work_dir(folder)
    if description["low_memory"]:
        options["low_memory"] = True
    if description["run"] == "cut":
        stages = description["order"].count(">") + 1
        files = 3 if description["schedule"] == "block" else 3 * stages
        cut_off(description, models, options, files=files)
        options["resume"] = True
    compressed = compress(description, models, options)
    compressed.save_pretrained(folder, description["format"])
    compressed.close()
    shutil.rmtree(work_dir(folder), ignore_errors=True)


def compress(description: Mapping[str, Any], models: Path, options: Mapping[str, Any]) -> Any:
    """Compress one case's model and return the `CompressedModel`."""
    import torch

    from optimum_order import JointCompressor

    model = description["model"]
    settings = dict(description["options"])
    if settings["calibration"] == "ids":
        size = (settings["calibration_samples"], settings["sequence_length"])
        generator = torch.Generator().manual_seed(0)
        settings["calibration"] = torch.randint(3, 64, size, generator=generator)
    source = str(models / model) if model in CONFIGS else model
    compressor = JointCompressor.from_pretrained(source, **settings)
    order = description["order"]
    return compressor.compress(order, description["schedule"], progress=False, **options)


def cut_off(
    description: Mapping[str, Any], models: Path, options: Mapping[str, Any], *, files: int
) -> None:
    """Begin a run in a child process and kill it (SIGKILL) once it has written so many files.

    Raises:
        RuntimeError: If the run ended before that.
    """
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=compress, args=(description, models, options))
    child.start()
    names: set[str] = set()
    while child.is_alive() and len(names) < files:
        names.update(file.name for file in options["work_dir"].glob("*.safetensors"))
        time.sleep(0.001)
    child.kill()
    child.join()
    if child.exitcode != -9:
        raise RuntimeError(
            f"The run ended with exit code {child.exitcode} and {len(names)} files before the kill."
        )


def export_by_command(
    description: Mapping[str, Any], folder: Path, more: Mapping[str, Any]
) -> None:
    """Run `optimum-order export` in this process."""
    from optimum_order.cli import main

    arguments = ["export", description["model"], str(folder), "--order", description["order"]]
    arguments += ["--format", description["format"], "--schedule", description["schedule"]]
    for option, value in (description["options"] | dict(more)).items():
        arguments += [f"--{option.replace('_', '-')}", str(value)]
    with contextlib.redirect_stdout(sys.stderr):
        try:
            main(arguments)
        except SystemExit as end:
            if end.code:
                raise


def work_dir(folder: Path) -> Path:
    """Return the work dir of the run that writes a folder."""
    return folder.with_name(f"{folder.name}.work")


# ---- the earlier version's environment


def install(commit: str, home: Path) -> str:
    """Install the package as it was at a commit into a virtual environment, unless it is there.

    Args:
        commit: The full hash.
        home: The environment's folder.

    Returns:
        The version that was installed.
    """
    stamp = home / "commit"
    source = home / "source"
    if home.exists() and not (home / "pyvenv.cfg").is_file():
        raise SystemExit(f"'{home}' exists and is no virtual environment; give another --home.")
    if not stamp.is_file() or stamp.read_text() != commit:
        print(f"Installing {commit[:7]} into {home} ...", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        site = output_of([home / "bin" / "python", "-I", "-c", SITE])
        # a .pth line adds a folder to the path, after the environment's own, without its .pth files
        Path(site, "dependencies.pth").write_text(output_of([sys.executable, "-c", SITE]) + "\n")
        source.mkdir()
        archive = home / "source.tar"
        subprocess.run(["git", "archive", "--output", archive, commit], cwd=ROOT, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(source, filter="data")
        archive.unlink()
        pip: list[str | Path] = [home / "bin" / "python", "-I", "-m", "pip", "install", "--quiet"]
        pip += ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed"]
        subprocess.run([*pip, source], check=True, env=environment())
        stamp.write_text(commit)
    stated = re.findall(r'__version__ = "(.+)"', (source / PACKAGE / "__init__.py").read_text())
    versions = output_of([home / "bin" / "python", "-I", "-c", VERSIONS]).split()
    if versions != stated * 2:
        raise SystemExit(f"'{home}' has versions {versions}, its source {stated}; remove it.")
    return versions[0]


def output_of(command: list[str | Path]) -> str:
    """Run a command and return what it prints, without the last line end."""
    output = subprocess.check_output(command, env=environment(), text=True)
    return output.strip()


def environment() -> dict[str, str]:
    """Return this process's environment without what would change the bytes or what is imported."""
    neutral = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return neutral | ENVIRONMENT


def machine() -> dict[str, str]:
    """Return what may change the bytes beside the code: libraries, processor, models."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described = [line for line in lines if line.startswith(("model name", "flags"))][:2]
        processor = hashlib.sha256("\n".join(described).encode()).hexdigest()
    versions |= {"python": platform.python_version(), "processor": processor}
    return versions | {"models": json.dumps(CONFIGS)}


def prepare(home: Path, *, refresh: bool) -> None:
    """Make the folders of artifacts and models; empty those that are not this machine's."""
    stamp = home / "machine.json"
    if refresh or not stamp.is_file() or read(stamp) != machine():
        shutil.rmtree(home / "before", ignore_errors=True)
        shutil.rmtree(home / "models", ignore_errors=True)
    shutil.rmtree(home / "after", ignore_errors=True)
    for name in ("before", "after", "models"):
        (home / name).mkdir(exist_ok=True)
    stamp.write_text(json.dumps(machine()))


def is_cached(name: str, folder: Path) -> bool:
    """Return whether a folder holds the artifact of a case as the case is described today."""
    file = folder / f"{name}.json"
    return file.is_file() and read(file) == read(file) | {"case": CASES[name], "error": None}


def export_all(python: Path | str, job: Mapping[str, Any], names: list[str]) -> None:
    """Run `work` in a process of its own; its warnings go to a log.

    Args:
        python: The interpreter, which decides the version.
        job: As `work` takes it, without the models and the cases.
        names: The cases.
    """
    sys.stdout.flush()
    output = Path(job["output"])
    file = output.with_suffix(".job.json")
    cases = {name: CASES[name] for name in names}
    job = {**job, "models": str(output.with_name("models")), "cases": cases}
    file.write_text(json.dumps(job), encoding="utf-8")
    log = output.with_suffix(".log")
    with log.open("w") as stream:
        command = [python, "-I", __file__, "--worker", file]
        done = subprocess.run(command, env=environment(), cwd=output, stderr=stream)
    if done.returncode:
        tail = "".join(log.read_text().splitlines(keepends=True)[-20:])
        raise SystemExit(f"{tail}\nThe process ended with exit code {done.returncode}.")


# ---- comparing


def tensors(folder: Path) -> dict[str, str]:
    """Return dtype, shape and sha256 of every tensor in a folder's safetensors files, by name.

    The file is read here byte by byte, so that no library can hide a difference.
    """
    described = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            digest = hashlib.sha256(data[begin:end]).hexdigest()
            described[name] = f"{entry['dtype']} {entry['shape']} {digest[:16]}"
    return described


def facts(folder: Path) -> dict[str, Any]:
    """Return what is compared of an artifact by path: tensors, config and manifest."""
    config = read(folder / "config.json").get("quantization_config")
    manifest = read(folder / "optimum_order.json")
    layers = {
        name: {fact: layer[fact] for fact in LAYER_FACTS if fact in layer}
        for name, layer in manifest["layers"].items()
    }
    stated = {"order": manifest.get("order"), "sparsity": manifest.get("sparsity")}
    return {
        **{f"tensors/{name}": described for name, described in tensors(folder).items()},
        **flat(config, "quantization_config"),
        **flat(stated | {"layers": layers}, "manifest"),
    }


def read(file: Path) -> Any:
    """Return what is in a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def flat(value: Any, path: str) -> dict[str, Any]:
    """Return the leaves of nested mappings by path."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flat(inner, f"{path}/{key}")
    return leaves


def differences(name: str, before: Path, after: Path) -> Iterator[tuple[str, str]]:
    """Yield each difference between two folders of a case: its name, and in words."""
    error = read(after.with_name(f"{name}.json"))["error"]
    if error is not None:
        yield f"{name}/export", f"the working tree failed with {error}"
        return
    first = facts(before)
    second = facts(after)
    for path in sorted(first.keys() | second.keys()):
        was = first.get(path, "missing")
        now = second.get(path, "missing")
        if was != now:
            yield f"{name}/{path}", f"was {was}, is {now}"


def compare(names: list[str], before: Path, after: Path) -> bool:
    """Print a table, the differences by name and a summary; return whether all are expected."""
    identical = 0
    unexpected: list[str] = []
    expected: list[str] = []
    used: set[str] = set()
    width = max(map(len, names))
    print(f"\n{'case':{width}}  {'format':18}  tensors      bytes  seconds  result")
    for name in names:
        surprises = []
        planned = []
        for difference, words in differences(name, before / name, after / name):
            reason = reason_of(difference, used)
            if reason is None:
                surprises.append(f"{difference}: {words}")
            else:
                planned.append(f"{difference}: {words} (expected: {reason})")
        result = "equal"
        if surprises or planned:
            result = f"DIFFERENT in {len(surprises)}" if surprises else "different as expected"
        seconds = [read(folder / f"{name}.json")["seconds"] for folder in (before, after)]
        size = sum(file.stat().st_size for file in (before / name).glob("*.safetensors"))
        timing = f"{seconds[0]:.1f}/{seconds[1]:.1f}"
        columns = f"{len(tensors(before / name)):7}  {size:9,}  {timing:>7}  {result}"
        format = read(before / name / "optimum_order.json")["format"]
        print(f"{name:{width}}  {format:18}  {columns}")
        identical += result == "equal"
        unexpected += surprises
        expected += planned
    for title, group in (("Expected differences", expected), ("Differences", unexpected)):
        if group:
            print(f"\n{title}:\n" + "\n".join(f"  {line}" for line in group))
    if len(names) == len(CASES):
        for pattern in EXPECTED.keys() - used:
            print(f"\nEXPECTED lists '{pattern}', and nothing differs there: remove that line.")
    more = f"{len(expected)} expected differences, {len(unexpected)} others"
    print(f"\n{identical} of {len(names)} artifacts byte-identical; {more}.")
    return not unexpected


def reason_of(difference: str, used: set[str]) -> str | None:
    """Return why a difference is expected, or None if it is not.

    Args:
        difference: Its name.
        used: Receives the pattern of `EXPECTED` that matches.
    """
    for pattern, reason in EXPECTED.items():
        if fnmatch.fnmatchcase(difference, pattern):
            used.add(pattern)
            return reason
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--baseline",
        default=BASELINE,
        metavar="COMMIT",
        help="default: %(default)s, which is 0.1.0",
    )
    parser.add_argument(
        "--home",
        type=Path,
        help="the baseline's environment and all files (default: .venv-0.1.0, or .venv-COMMIT)",
    )
    parser.add_argument(
        "--refresh", action="store_true", help="export the baseline's artifacts again"
    )
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="only the cases that match, such as 'gpt2-*'"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        work(read(args.worker))
        return
    names = fnmatch.filter(CASES, args.only)
    if not names:
        parser.error(f"No case matches '{args.only}'; there are {', '.join(CASES)}.")
    begin = time.perf_counter()
    revision = f"{args.baseline}^{{commit}}"
    commit = output_of(["git", "-C", ROOT, "rev-parse", "--verify", revision])
    usual = ".venv-0.1.0" if args.baseline == BASELINE else f".venv-{commit[:7]}"
    home = (args.home or ROOT / usual).resolve()
    version = install(commit, home)
    prepare(home, refresh=args.refresh)
    before = home / "before"
    after = home / "after"
    missing = [name for name in names if not is_cached(name, before)]
    if missing:
        print(f"{version} exports {len(missing)} of {len(names)} cases; the others are cached.")
        job = {"tree": None, "inside": str(home), "output": str(before), "options": {}}
        export_all(home / "bin" / "python", job, missing)
    for name in names:
        if error := read(before / f"{name}.json")["error"]:
            log = home / "before.log"
            raise SystemExit(f"{version} cannot export '{name}': {error}. See '{log}'.")
    print(f"The working tree exports {len(names)} cases.")
    job = {"tree": str(ROOT), "inside": str(ROOT / PACKAGE), "output": str(after)}
    export_all(sys.executable, job | {"options": TREE_OPTIONS}, names)
    good = compare(names, before, after)
    seconds = math.ceil(time.perf_counter() - begin)
    print(f"{seconds} s in all; the artifacts are in {before} and {after}.")
    sys.exit(not good)


if __name__ == "__main__":
    main()
