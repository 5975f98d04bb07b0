"""GGUF files in llama.cpp: families, equal values, speed, and the usual route.

Tiny random models of every architecture that is written are compressed, saved as GGUF, read back by
the package `gguf` and by transformers, and run in llama.cpp, in an environment of its own:

    make engines
    python benchmarks/run_llama.py                      # families
    python benchmarks/run_llama.py --model FOLDER       # speed and the usual route, of a model
    python benchmarks/run_llama.py --model tiny-llama --types q4_k q3_k     # K-quants
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from gguf import GGUFReader

from optimum_order import JointCompressor
from optimum_order.formats import gguf_vocabulary

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-llama" / "bin" / "python"
MIXES = ("q4_k_m",)
"""Types of llama.cpp that give tensors types by their names."""
TEXT = (
    "The import statement combines two operations: it searches for the named module, then it binds "
    "the results of that search to a name in the local scope."
)
TEXTS = (
    TEXT,
    "Hello  world, it's 2026 and we've 1234567 tokens!\n\n\tdef f(x):\n        return x**2",
    "Grüße aus Köln – naïve café, 東京 and 🙂🙂.",
    "  leading and trailing  ",
)
GENERATED = 16
"""Tokens of greedy text."""
_SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_WIDE = {"head_dim": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases, scaled": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", _WIDE),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_WIDE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {**_WIDE, "query_pre_attn_scalar": 64, "sliding_window": 16, "num_hidden_layers": 6},
    ),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
}
"""By name: the family in transformers, and what its config has beside the usual shape."""


def build(name: str) -> Any:
    """Return a random model of one family, in bfloat16."""
    family, more = MODELS[name]
    config_class = getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config_class(**{**_SHAPE, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases are all alike in a new model
                parameter.add_(torch.linspace(-0.2, 0.3, len(parameter)))
    return model.to(torch.bfloat16).eval()


def tokenizer() -> Any:
    """Return the tokenizer of tiny-llama."""
    compressor = JointCompressor.from_pretrained("tiny-llama")
    return compressor.source.processor


def ask(jobs: list[dict[str, Any]], scratch: Path, python: Path = PYTHON) -> list[dict[str, Any]]:
    """Return the answers of llama.cpp, see `engine_load.py`.

    Args:
        jobs: Each with the `folder` and the `prompt`.
        scratch: A folder for files.
        python: The interpreter of the environment that has llama.cpp.
    """
    for index, job in enumerate(jobs):
        job |= {"packages": (), "import_first": None, "answer": str(scratch / f"{index}.json")}
    plan = scratch / "jobs.json"
    plan.write_text(json.dumps({"facts_file": str(scratch / "facts.json"), "jobs": jobs}))
    script = Path(__file__).with_name("engine_load.py")
    subprocess.run([python, script, "llama.cpp", plan], check=True)
    return [json.loads(Path(job["answer"]).read_text()) for job in jobs]


def reference(model: Any, prompt: list[int], generate: int) -> tuple[list[float], list[int]]:
    """Return what transformers computes in float32.

    Args:
        model: The model; its values stay as they are.
        prompt: Token ids.
        generate: Tokens to choose after them, always the likeliest.

    Returns:
        The log-probabilities of all tokens of the prompt but the first, and the chosen tokens.
    """
    ids = torch.tensor([prompt])
    # a new one: its rotary frequencies never were in bfloat16
    exact = type(model)(model.config).float().eval()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        logprobs = exact(ids).logits[0, :-1].log_softmax(-1)
        for _ in range(generate):
            ids = torch.cat([ids, exact(ids).logits[:, -1:].argmax(-1)], 1)
    chosen = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    return chosen.tolist(), ids[0, len(prompt) :].tolist()


def families(scratch: Path, *, quantized: bool) -> list[dict[str, Any]]:
    """Run a random model of every family in llama.cpp, and compare it with transformers.

    Args:
        scratch: An empty folder.
        quantized: Whether layers have 4 bits; otherwise all is float32, and nothing is rounded.

    Returns:
        For each family the mean and the largest difference of log-probabilities, the loss in
        llama.cpp and in transformers, how many tokens of greedy text are the same, and how many
        layers of all have the values that were measured.
    """
    processor = tokenizer()
    prompt = processor(TEXT)["input_ids"] * 2
    jobs, expected, equal = [], [], []
    for index, name in enumerate(MODELS):
        model = build(name) if quantized else build(name).float()
        compressor = JointCompressor(model, processor=processor)
        order = "rtn(bits=4, group_size=32)" if quantized else "magnitude:0.3"
        result = compressor.compress(order, format="gguf", progress=False)
        folder = scratch / str(index)
        result.save_pretrained(folder, "gguf")
        equal.append(equal_layers(result.layers, folder))
        expected.append(reference(result.model, prompt, GENERATED))
        jobs.append({"folder": str(folder), "prompt": prompt, "generate": GENERATED})
    rows = []
    for name, answer, (logprobs, greedy), layers in zip(
        MODELS, ask(jobs, scratch), expected, equal, strict=True
    ):
        if "error" in answer:
            raise SystemExit(f"{name}: {answer['error']}")
        differences = [
            abs(one - other) for one, other in zip(answer["logprobs"], logprobs, strict=True)
        ]
        same = [one == other for one, other in zip(answer["generated"], greedy, strict=True)]
        rows.append(
            {
                "family": name,
                "mean": sum(differences) / len(differences),
                "largest": max(differences),
                "loss": -sum(answer["logprobs"]) / len(logprobs),
                "expected": -sum(logprobs) / len(logprobs),
                "greedy": sum(same),
                "layers": layers,
            }
        )
    return rows


def equal_layers(layers: Mapping[str, Any], folder: Path) -> str:
    """Return how many layers have equal values, of all: by the package `gguf`, not by our reader.

    Args:
        layers: The states that were measured, by name.
        folder: The folder that they were saved in.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(folder / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored = json.loads((folder / "optimum_order.json").read_text())["layers"]
    equal = 0
    for name, state in layers.items():
        parts = []
        for tensor, first, rows, heads in stored[name]["stored"]["rows"]:
            values = dequantize(tensors[tensor].data, tensors[tensor].tensor_type)
            matrix = torch.from_numpy(values.copy()).reshape(-1, values.shape[-1])
            if heads:
                matrix = matrix.view(heads, -1, 2, matrix.shape[1]).transpose(1, 2).flatten(0, 2)
            parts.append(matrix[first : first + rows])
        equal += torch.equal(torch.cat(parts).to(state.weight.dtype), state.weight)
    return f"{equal}/{len(layers)}"


def tokenizers() -> dict[str, Any]:
    """Return a small tokenizer of every kind that is written, by name."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = [*TEXTS, Path(__file__).read_text(), (ROOT / "README.md").read_text()]
    qwen = next(rule for rule, name in gguf_vocabulary.RULES.items() if name == "qwen2")
    llama = next(rule for rule, name in gguf_vocabulary.RULES.items() if name == "dbrx")

    def of_bytes(splitter: Any, **options: Any) -> Any:
        tokenizer = Tokenizer(models.BPE(**options))
        tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(text, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    def split_by(rule: str) -> Any:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(rule), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def of_characters(*steps: Any) -> Any:
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=["<unk>", "<s>", "</s>", *bytes_],
            limit_alphabet=70,
            show_progress=False,
        )
        tokenizer.train_from_iterator(text, trainer)
        rules = json.loads(tokenizer.to_str())
        # bytes are what unknown characters become, and no words of their own
        rules["added_tokens"] = rules["added_tokens"][:3]
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(rules)), unk_token="<unk>"
        )

    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "gpt-2": of_bytes(level),
        "smollm": of_bytes(pre_tokenizers.Sequence([digits, level])),
        "qwen2": of_bytes(split_by(qwen)),
        "dbrx": of_bytes(split_by(llama)),
        "llama-bpe": of_bytes(split_by(llama), ignore_merges=True),
        "characters": of_characters(),
        "characters after a space": of_characters(normalizers.Prepend("▁")),
    }


def route(args: argparse.Namespace, scratch: Path) -> None:
    """Compare our codes with llama.cpp's own rounding, of the model and of the same weights.

    Args:
        args: The model, the order, the calibration data and how many windows to measure on.
        scratch: An empty folder.
    """
    compressor = JointCompressor.from_pretrained(
        args.model, dtype="bfloat16", calibration=args.calibration, sequence_length=args.length
    )
    ids = compressor.evaluation_samples(args.evaluation, args.windows).inputs()
    windows = [row for batch in ids for row in batch["input_ids"].tolist()][: args.windows]
    result = compressor.compress(args.order, engine="llama.cpp")
    result.save_pretrained(scratch / "ours", engine="llama.cpp")
    print(f"equal layers {equal_layers(result.layers, scratch / 'ours')}", flush=True)
    compressor.compress("magnitude:0", format="gguf").save_pretrained(scratch / "dense", "gguf")
    same = JointCompressor(result.model, processor=compressor.source.processor)
    same.compress("magnitude:0", format="gguf").save_pretrained(scratch / "same", "gguf")
    for source, target in (("dense", "usual"), ("same", "again")):
        (scratch / target).mkdir()
        files = [str(scratch / folder / "model.gguf") for folder in (source, target)]
        script = Path(__file__).with_name("llama_quantize.py")
        subprocess.run([PYTHON, script, *files], check=True, capture_output=True)
    names = {
        "dense": "the model in bfloat16",
        "ours": f"{args.order}, code for code",
        "usual": "the model, rounded to Q4_0 by llama.cpp",
        "again": "the weights of ours, rounded to Q4_0 again",
    }
    prompt = windows[0][:32]
    job = {"prompt": prompt, "windows": windows, "generate": args.generate, "limit": 3600}
    answers = ask([job | {"folder": str(scratch / name)} for name in names], scratch)
    losses = {name: torch.tensor(answers[i]["losses"]) for i, name in enumerate(names)}
    for (name, title), answer in zip(names.items(), answers, strict=True):
        difference = losses[name] - losses["ours"]
        error = 1.96 * difference.std() / len(difference) ** 0.5
        size = (scratch / name / "model.gguf").stat().st_size
        speed = [args.generate / seconds for seconds in answer["seconds"]]
        print(
            f"{title:45} {size:>11,} bytes, perplexity {losses[name].mean().exp():.4f}, loss less "
            f"ours {difference.mean():+.4f} ± {error:.4f}, tokens/s {speed[0]:.1f} (of CPU time "
            f"{speed[1]:.1f})",
            flush=True,
        )
    wall, cpu = transformers_speed(result.model, prompt, args.generate)
    with torch.no_grad():
        ours = [
            result.model(torch.tensor([window]), labels=torch.tensor([window])).loss.item()
            for window in windows
        ]
    loss = torch.tensor(ours).mean()
    print(
        f"{'the same in transformers, bfloat16':45} perplexity {loss.exp():.4f}, tokens/s "
        f"{wall:.1f} (of CPU time {cpu:.1f})"
    )
    print(f"llama.cpp is {args.generate / answers[1]['seconds'][0] / wall:.1f} times as fast")


def importances(compressor: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean squares of the inputs of every layer, by the tensor of a GGUF file.

    Args:
        compressor: Of the model; all of its calibration samples are read.
        stored: The layers in the manifest of a GGUF folder.
    """
    model = compressor.compress("magnitude:0", progress=False).model
    sums: dict[str, Any] = {}
    tokens: dict[str, int] = {}

    def count(name: str, rows: Any) -> None:
        sums[name] = sums.get(name, 0) + rows.double().square().sum(0)
        tokens[name] = tokens.get(name, 0) + len(rows)

    for name in stored:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: count(name, inputs[0].flatten(0, -2))
        )
    with torch.no_grad():
        for batch in compressor.draw().inputs():
            model(**batch)
    return {
        stored[name]["stored"]["rows"][0][0]: (total / tokens[name]).float().numpy()
        for name, total in sums.items()
    }


def mixtures(dense: str, theirs: str) -> list[str]:
    """Return orders that choose a K-quant for each layer, in the bits of a file of llama.cpp.

    Args:
        dense: The file of the model in bfloat16.
        theirs: What llama.cpp made of it, with embeddings as they were.
    """
    tensors = [{t.name: t for t in GGUFReader(file).tensors} for file in (dense, theirs)]
    layers = [
        name for name, t in tensors[1].items() if t.tensor_type != tensors[0][name].tensor_type
    ]
    total = sum(int(tensors[1][name].n_bytes) for name in layers)
    weights = sum(int(tensors[1][name].n_elements) for name in layers)
    bits = math.floor(8e4 * total / weights) / 1e4
    widths = "[q2_k,q3_k,q4_k,q5_k,q6_k,8]"
    return [f"mixed_precision(bits={bits}, fuse=false, widths={widths})"]


def k_quants(args: argparse.Namespace, scratch: Path) -> None:
    """Compare our rounding on the grids of K-quants with llama.cpp's own, in llama.cpp.

    Args:
        args: The model, the types, the data and how many windows to measure on.
        scratch: An empty folder.
    """
    compressor = JointCompressor.from_pretrained(
        args.model, dtype="bfloat16", calibration=args.calibration, sequence_length=args.length
    )
    ids = compressor.evaluation_samples(args.evaluation, args.windows).inputs()
    windows = [row for batch in ids for row in batch["input_ids"].tolist()][: args.windows]
    compressor.compress("magnitude:0", format="gguf").save_pretrained(scratch / "dense", "gguf")
    stored = json.loads((scratch / "dense" / "optimum_order.json").read_text())["layers"]
    matrix = scratch / "importance.npz"
    np.savez(matrix, **importances(compressor, stored))
    names = {"dense": "the model in bfloat16"}
    bests: dict[str, str] = {}
    script = Path(__file__).with_name("llama_quantize.py")
    for kind in args.types:
        for title, extra in (("llama.cpp", []), ("llama.cpp, importance matrix", [str(matrix)])):
            name = f"{kind}-{len(names)}"
            names[name] = f"{kind}: {title}"
            (scratch / name).mkdir()
            files = [str(scratch / folder / "model.gguf") for folder in ("dense", name)]
            subprocess.run([PYTHON, script, *files, kind, *extra], check=True, capture_output=True)
        orders = [f"rtn:{kind}", f"gptq:{kind}", f"gptq(bits={kind}, zero=true)"]
        if kind in MIXES:
            orders = mixtures(files[0], files[1])
            bests[kind] = f"{kind}: {orders[0]}"
        for order in orders:
            result = compressor.compress(order, format="gguf")
            if kind not in MIXES and str(result.order) != order:
                continue  # zero is on every grid of the kind
            name = f"{kind}-{len(names)}"
            names[name] = f"{kind}: {order}"
            result.save_pretrained(scratch / name, "gguf")
            print(
                f"{order}: equal layers {equal_layers(result.layers, scratch / name)}", flush=True
            )
    prompt = windows[0][:32]
    job = {"prompt": prompt, "windows": windows, "limit": 3600}
    answers = ask([job | {"folder": str(scratch / name)} for name in names], scratch)
    losses = {name: torch.tensor(answers[i]["losses"]) for i, name in enumerate(names)}
    for name, title in names.items():
        kind = name.partition("-")[0]
        text = bests.get(kind, f"{kind}: gptq:{kind}")
        best = next((key for key, title_ in names.items() if title_ == text), name)
        difference = losses[name] - losses[best]
        error = 1.96 * difference.std() / len(difference) ** 0.5
        size = (scratch / name / "model.gguf").stat().st_size
        print(
            f"{title:45} {size:>11,} bytes, perplexity {losses[name].mean().exp():.4f}, loss less "
            f"that of '{names[best]}' {difference.mean():+.4f} ± {error:.4f}",
            flush=True,
        )


def transformers_speed(model: Any, prompt: list[int], generate: int) -> tuple[float, float]:
    """Return tokens per second of wall and of CPU time, of greedy text with a cache."""
    torch.set_num_threads(1)
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "min_new_tokens": generate, "max_new_tokens": generate}
    with torch.no_grad():
        model.generate(ids, do_sample=False, max_new_tokens=2)
        begin = time.perf_counter(), time.process_time()
        model.generate(ids, **options)
        seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    return generate / seconds[0], generate / seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model to compare routes with, in place of families")
    parser.add_argument("--types", nargs="+", help="K-quants to compare with llama.cpp's own")
    parser.add_argument("--order", default="gptq(bits=4, group_size=32)")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=24, help="windows to measure on")
    parser.add_argument("--generate", type=int, default=64, help="tokens to measure speed with")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.model and args.types:
            k_quants(args, Path(scratch))
            return
        if args.model:
            route(args, Path(scratch))
            return
        for quantized in (False, True):
            folder = Path(scratch) / str(quantized)
            folder.mkdir()
            print("4 bits" if quantized else "float32")
            for row in families(folder, quantized=quantized):
                print(
                    f"  {row['family']:26} equal layers {row['layers']:>7}, log-probabilities "
                    f"differ by {row['mean']:.2g} (largest {row['largest']:.2g}), greedy "
                    f"{row['greedy']}/{GENERATED}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
