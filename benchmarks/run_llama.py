"""GGUF files in llama.cpp: families, equal values, speed, and the usual route.

Tiny random models of every architecture that is written are compressed, saved as GGUF, read back by
the package `gguf` and by transformers, and run in llama.cpp, in an environment of its own:

    make engines
    python benchmarks/run_llama.py                      # families
    python benchmarks/run_llama.py --model FOLDER       # speed and the usual route, of a model
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from optimum_order import JointCompressor

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-llama" / "bin" / "python"
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
