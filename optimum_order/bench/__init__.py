"""The speed and the memory of a saved model in the engines that are installed.

Each engine loads the folder in a process of its own, which is stopped after a time. That process
may run another Python, so `worker` needs nothing of this package.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimum_order.artifact import adapter
from optimum_order.errors import ArtifactError, OptimumOrderError, unknown
from optimum_order.files import read_json
from optimum_order.models.quantizer import METHOD

_WORKER = Path(__file__).with_name("worker.py")
_START = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
"""Runs a file without its folder on the path, where our modules would hide others."""
_LAST_LINES = 300
"""Characters of what a process that died said last."""


@dataclass(frozen=True)
class Engine:
    """A program that runs models.

    Args:
        name: As users call it.
        module: What is imported.
        install: What to type to get it.
        reads: Whether it reads a folder of "safetensors", "gguf" or both.
    """

    name: str
    module: str
    install: str
    reads: tuple[str, ...]


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("transformers", "transformers", "pip install transformers", ("safetensors", "gguf")),
        Engine("llama.cpp", "llama_cpp", "pip install llama-cpp-python", ("gguf",)),
        Engine("vllm", "vllm", "pip install vllm", ("safetensors",)),
    )
}
"""By name."""
_OTHER_FORMAT = {
    "gguf": "'optimum-order compress {folder} OUT --format gguf' writes what it reads",
    "safetensors": "it is run on folders of safetensors only",
}


@dataclass(frozen=True)
class Load:
    """What an engine has to do.

    Args:
        prompt: Tokens that are read at once.
        generate: Tokens that are generated one by one.
        repeats: How often; the median counts.
        threads: Threads on the CPU.
        timeout: Seconds after which the process of an engine is stopped.
    """

    prompt: int = 128
    generate: int = 32
    repeats: int = 3
    threads: int = 1
    timeout: float = 600.0

    def __post_init__(self) -> None:
        least = {"prompt": 1, "generate": 1, "repeats": 1, "threads": 1, "timeout": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise OptimumOrderError(
                    f"'{name}' must be at least {number}, got {getattr(self, name)}."
                )


@dataclass(frozen=True)
class Speed:
    """What one engine did.

    Args:
        engine: Its name.
        status: "ok", "failed", "not installed" or "not run".
        reason: Why, where it is not "ok"; one line.
        version: Of the engine, where it was imported.
        device: "cpu" or "cuda", where it ran.
        load_seconds: Until the model was ready, with the imports that this took.
        prompt_rate: Tokens read in a second.
        generate_rate: Tokens generated in a second.
        peak_bytes: The most memory that the process held at once, of the engine itself too.
        peak_device_bytes: The most memory that it allocated on a GPU; 0 on the CPU.
    """

    engine: str
    status: str
    reason: str | None = None
    version: str | None = None
    device: str | None = None
    load_seconds: float | None = None
    prompt_rate: float | None = None
    generate_rate: float | None = None
    peak_bytes: int | None = None
    peak_device_bytes: int | None = None


def engine_of(text: str) -> tuple[Engine, str]:
    """Return an engine and the Python that has it, from "NAME" or "NAME=PYTHON".

    Raises:
        OptimumOrderError: If there is no such engine, or no such program.
    """
    name, _, python = text.partition("=")
    if name not in ENGINES:
        raise OptimumOrderError(unknown("engine", name, ENGINES))
    if not python:
        return ENGINES[name], sys.executable
    if not (Path(python).is_file() and os.access(python, os.X_OK)):
        raise OptimumOrderError(
            f"'{python}' is no program; give the python of the environment that has {name}, such "
            f"as {name}=env/bin/python."
        )
    # it is started in another folder; a link of a virtual environment must stay a link
    return ENGINES[name], str(Path(python).absolute())


def measure(
    folder: Path,
    engines: Iterable[tuple[Engine, str]],
    load: Load,
    *,
    progress: Callable[[str], None] = lambda engine: None,
) -> list[Speed]:
    """Run a saved model in engines, one after the other.

    Args:
        folder: With a config.json, and with safetensors files or one GGUF file.
        engines: Each with the Python that has it.
        load: What each has to do.
        progress: Called with the name of each engine that is started.

    Raises:
        ArtifactError: If the folder holds no model, or the model is too short for the tokens.
    """
    if (folder / adapter.FOLDER).is_dir():
        raise ArtifactError(
            f"'{folder}' has an adapter, which no engine here adds: it would be measured without. "
            "Measure the model without the stage that made it."
        )
    job = _job(folder, load)
    speeds = []
    for engine, python in engines:
        kind = "gguf" if job["gguf_file"] else "safetensors"
        if kind not in engine.reads:
            reason = _OTHER_FORMAT[engine.reads[0]].format(folder=folder)
            speeds.append(Speed(engine.name, "not run", reason))
            continue
        if python == sys.executable and importlib.util.find_spec(engine.module) is None:
            speeds.append(_absent(engine, python))
            continue
        progress(engine.name)
        speeds.append(_run(engine, python, job, load))
    return speeds


def _absent(engine: Engine, python: str) -> Speed:
    install = engine.install
    if python != sys.executable:
        install = f"{python} -m {install}"
    return Speed(engine.name, "not installed", install)


def _job(folder: Path, load: Load) -> dict[str, Any]:
    """Return what a worker has to know, but for the engine.

    Raises:
        ArtifactError: As `measure`.
    """
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder '{folder}'; give one that holds a saved model.")
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"'{folder}' has no config.json; give the folder of a saved model.")
    config = read_json(folder / "config.json")
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) > 1 or (not files and not any(folder.glob("*.safetensors"))):
        raise ArtifactError(
            f"'{folder}' must hold safetensors files or one GGUF file, got "
            f"{', '.join(files) or 'neither'}."
        )
    text = config.get("text_config")
    sizes = text if isinstance(text, dict) else config
    longest, words = sizes.get("max_position_embeddings"), sizes.get("vocab_size")
    tokens = load.prompt + load.generate
    if isinstance(longest, int) and tokens > longest:
        raise ArtifactError(
            f"The model in '{folder}' reads {longest} tokens at most, got {load.prompt} of a "
            f"prompt and {load.generate} to generate; give fewer."
        )
    if not isinstance(words, int) or words < 1:
        raise ArtifactError(f"The config.json in '{folder}' names no vocab_size.")
    quantization = config.get("quantization_config")
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == METHOD
    return {
        "folder": str(folder.resolve()),
        "gguf_file": files[0] if files else None,
        "import_first": "optimum_order" if ours else None,
        # any words do, and the same for every engine
        "prompt": [place * 7919 % words for place in range(1, load.prompt + 1)],
        "generate": load.generate,
        "repeats": load.repeats,
        "threads": load.threads,
    }


def _run(engine: Engine, python: str, job: dict[str, Any], load: Load) -> Speed:
    """Run one engine in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.json"
        plan = Path(scratch) / "job.json"
        plan.write_text(json.dumps({**job, "engine": engine.name, "answer": str(answer)}))
        command = [python, "-c", _START, str(_WORKER), str(plan)]
        died = _finish(command, scratch, load)
        if not answer.is_file():
            return Speed(engine.name, "failed", died or "its process left no answer")
        facts = read_json(answer)
    if "missing" in facts:
        return _absent(engine, python)
    if "error" in facts:
        return Speed(engine.name, "failed", facts["error"], facts.get("version"))
    return Speed(engine.name, "ok", **facts)


def _finish(command: Sequence[str], scratch: str, load: Load) -> str | None:
    """Run a process to its end, or stop it and all that it started.

    Returns:
        Why it did not end well, or None if it did.
    """
    threads = str(load.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = Path(scratch) / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 - a program that the user named, and no shell
            command,
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(load.timeout)
        except subprocess.TimeoutExpired:
            return f"it took more than {load.timeout:g} s; give a longer --timeout"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not code:
        return None
    said = " ".join(log.read_text(errors="replace").split())[-_LAST_LINES:]
    return f"its process ended with exit code {code}: {said}"
