"""Run one model in one engine, and write how fast and how large: started by `bench`.

The environment of an engine need not have optimum-order, so nothing of it is imported here, except
where the folder's own format asks for that.

    python worker.py JOB.json
"""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Pass = Callable[[], tuple[float, float]]
"""Reads the prompt and generates: the seconds of each."""
_LENGTH = 200
"""Characters of a reason."""
_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that this process holds all memory
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def transformers(job: Job) -> tuple[Pass, str]:
    """Load the folder with stock transformers.

    Returns:
        The pass, and the device.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options: dict[str, Any] = {"dtype": "auto"}
    if job["gguf_file"]:
        # the file alone lacks what llama.cpp does not need
        options["config"] = AutoConfig.from_pretrained(job["folder"])
        options["gguf_file"] = job["gguf_file"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(job["folder"], **options)
    model = loaded.to(device).eval()
    prompt = torch.tensor([job["prompt"]], device=device)

    def run() -> tuple[float, float]:
        with torch.no_grad():
            begin = _now(torch)
            output = model(input_ids=prompt, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
            middle = _now(torch)
            for _ in range(job["generate"]):
                output = model(
                    input_ids=token, past_key_values=output.past_key_values, use_cache=True
                )
                token = output.logits[:, -1:].argmax(-1)
            return middle - begin, _now(torch) - middle

    return run, device


def _now(torch: Any) -> float:
    """Return the time once a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def llama_cpp(job: Job) -> tuple[Pass, str]:
    """Load the GGUF file of the folder.

    Returns:
        The pass, and the device.
    """
    from llama_cpp import Llama, llama_supports_gpu_offload

    gpu = bool(llama_supports_gpu_offload())
    length = len(job["prompt"]) + job["generate"] + 1
    model = Llama(
        str(Path(job["folder"]) / job["gguf_file"]),
        n_ctx=length,
        n_batch=length,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        n_gpu_layers=-1 if gpu else 0,
        verbose=False,
    )

    def run() -> tuple[float, float]:
        model.reset()
        begin = time.perf_counter()
        model.eval(job["prompt"])
        token = model.sample(temp=0.0)
        middle = time.perf_counter()
        for _ in range(job["generate"]):
            model.eval([token])
            token = model.sample(temp=0.0)
        return middle - begin, time.perf_counter() - middle

    return run, "cuda" if gpu else "cpu"


def vllm(job: Job) -> tuple[Pass, str]:
    """Load the folder in vLLM, in this process.

    Returns:
        The pass, and the device.
    """
    import torch
    from vllm import LLM, SamplingParams

    length = len(job["prompt"]) + job["generate"] + 1
    engine = LLM(
        job["folder"],
        max_model_len=length,
        max_num_seqs=1,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    prompt: Any = [{"prompt_token_ids": job["prompt"]}]

    def seconds(tokens: int) -> float:
        parameters = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        engine.generate(prompt, parameters, use_tqdm=False)
        return time.perf_counter() - begin

    def run() -> tuple[float, float]:
        first = seconds(1)
        return first, seconds(1 + job["generate"]) - first

    return run, "cuda" if torch.cuda.is_available() else "cpu"


ENGINES: dict[str, tuple[str, str, Callable[[Job], tuple[Pass, str]]]] = {
    "transformers": ("transformers", "transformers", transformers),
    "llama.cpp": ("llama_cpp", "llama-cpp-python", llama_cpp),
    "vllm": ("vllm", "vllm", vllm),
}
"""By name: the module, the package, and what loads a folder."""


def answer(job: Job) -> dict[str, Any]:
    """Return what the engine of a job did.

    Args:
        job: See `bench`.
    """
    module, package, load = ENGINES[job["engine"]]
    os.environ.update(_VLLM if module == "vllm" else {})
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return {"missing": module}
    facts: dict[str, Any] = {"version": _version(package)}
    try:
        if job["import_first"]:
            importlib.import_module(job["import_first"])
        begin = time.perf_counter()
        run, facts["device"] = load(job)
        facts["load_seconds"] = time.perf_counter() - begin
        run()  # what is compiled or allocated on first use
        passes = [run() for _ in range(job["repeats"])]
    except Exception as error:  # whatever an engine raises is the answer
        return {"version": facts["version"], "error": _reason(error)}
    first, rest = (statistics.median(seconds) for seconds in zip(*passes, strict=True))
    facts["prompt_rate"] = len(job["prompt"]) / max(first, 1e-9)
    facts["generate_rate"] = job["generate"] / max(rest, 1e-9)
    facts["peak_bytes"] = _peak()
    facts["peak_device_bytes"] = _device_peak()
    return facts


def _version(package: str) -> str | None:
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _peak() -> int:
    """Return the most memory that this process held at once, in bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process that started this one held
        (line,) = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(line) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_peak() -> int:
    """Return the most memory that torch allocated on a GPU, in bytes."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    return int(torch.cuda.max_memory_allocated())


def _reason(error: BaseException) -> str:
    """Return an error as one short line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}"[:_LENGTH].rstrip(".: ")


def main() -> None:
    """Do the job of the file that is named."""
    job = json.loads(Path(sys.argv[-1]).read_text())
    facts = answer(job)
    Path(job["answer"]).write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
