"""llama.cpp, in the environment that `make engines` makes: what is saved runs there as it is meant."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimum_order import JointCompressor, bench
from optimum_order.formats import engines
from optimum_order.formats.engines import SEVERAL, Case

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-llama" / "bin" / "python"
pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(not PYTHON.exists(), reason="run by make engines"),
]


def module(name):
    """A module of the folder benchmarks."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def benchmark():
    return module("run_llama")


def test_every_family_computes_what_transformers_computes(benchmark, tmp_path):
    """Stored as float32, so that nothing is rounded on either side."""
    rows = benchmark.families(tmp_path, quantized=False)
    assert len(rows) == len(benchmark.MODELS)
    for row in rows:
        # ggml looks up GELU in a table of float16
        most = 5e-3 if row["family"] == "gemma3" else 1e-4
        assert row["greedy"] == benchmark.GENERATED, row
        assert row["largest"] < most, row


def test_every_quantized_family_runs(benchmark, tmp_path):
    """llama.cpp rounds inputs of quantized layers to 8 bits, which random models feel most."""
    for row in benchmark.families(tmp_path, quantized=True):
        equal, layers = row["layers"].split("/")
        assert equal == layers, row
        assert abs(row["loss"] - row["expected"]) < 0.05, row
        assert row["mean"] < 0.1, row


def test_a_trained_model_says_the_same(benchmark, tmp_path):
    compressor = JointCompressor.from_pretrained("tiny-llama")
    tokenizer = compressor.source.processor
    prompt = tokenizer(benchmark.TEXT)["input_ids"]
    jobs, expected = [], []
    for index, order in enumerate(["rtn(bits=8, group_size=32)", "rtn(bits=4, group_size=32)"]):
        result = compressor.compress(order, engine="llama.cpp", progress=False)
        result.save_pretrained(tmp_path / str(index), engine="llama.cpp")
        expected.append(benchmark.reference(result.model, prompt, 24))
        job = {"folder": str(tmp_path / str(index)), "prompt": prompt, "generate": 24}
        jobs.append(job | {"texts": list(benchmark.TEXTS)})
    answers = benchmark.ask(jobs, tmp_path)
    tokens = [tokenizer(text)["input_ids"] for text in benchmark.TEXTS]
    for answer, (logprobs, greedy) in zip(answers, expected, strict=True):
        assert answer["generated"] == greedy
        assert answer["tokens"] == tokens
        loss = -sum(answer["logprobs"]) / len(logprobs)
        assert abs(loss + sum(logprobs) / len(logprobs)) < 0.02


def check_same(benchmark, prompt, results, scratch):
    """Save results, and have llama.cpp compute what transformers does with each.

    Args:
        benchmark: The module run_llama.
        prompt: Tokens.
        results: Compressed models by the name of the folder to save each to.
        scratch: Where the folders will be.
    """
    jobs, expected = [], []
    for name, result in results.items():
        result.save_pretrained(scratch / name, "gguf")
        assert benchmark.equal_layers(result.layers, scratch / name) == "28/28"
        expected.append(benchmark.reference(result.model, prompt, 8))
        jobs.append({"folder": str(scratch / name), "prompt": prompt, "generate": 8})
    answers = benchmark.ask(jobs, scratch)
    for name, answer, (logprobs, greedy) in zip(results, answers, expected, strict=True):
        loss = -sum(answer["logprobs"]) / len(logprobs)
        assert abs(loss + sum(logprobs) / len(logprobs)) < 0.03, name
        assert answer["generated"][:4] == greedy[:4], name


def test_k_quants_compute_what_transformers_computes(benchmark, tmp_path):
    """Each on the grid that was measured, and as fast a file as any."""
    compressor = JointCompressor.from_pretrained(
        "tiny-llama", calibration="builtin", calibration_samples=8
    )
    prompt = compressor.source.processor(benchmark.TEXT)["input_ids"]
    results = {}
    for kind in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"):
        order = f"magnitude:0.1 > rtn:{kind}"
        results[kind] = compressor.compress(order, format="gguf", progress=False)
    order = "mixed_precision(bits=4.5, quantizer=rtn, fuse=false, widths=[q2_k,q4_k,q5_k,q6_k,8])"
    results["mixed"] = compressor.compress(order, format="gguf", progress=False)
    check_same(benchmark, prompt, results, tmp_path)


def test_a_file_that_llama_cpp_made_is_pruned_on_its_grid_and_runs_there_again(benchmark, tmp_path):
    """Quantized by llama.cpp itself; what is not pruned has the codes that it had."""
    compressor = JointCompressor.from_pretrained("tiny-llama")
    prompt = compressor.source.processor(benchmark.TEXT)["input_ids"]
    compressor.compress("magnitude:0.0", progress=False).save_pretrained(tmp_path / "in", "gguf")
    results = {}
    for kind in ("q4_0", "q3_k", "q6_k"):
        theirs = tmp_path / f"{kind}.gguf"
        script = ROOT / "benchmarks" / "llama_quantize.py"
        source = tmp_path / "in" / "model.gguf"
        subprocess.run([PYTHON, script, source, theirs, kind], check=True, capture_output=True)
        before = JointCompressor.from_pretrained(theirs)
        weights = {name: state.weight for name, state in before.source.states.items()}
        result = before.compress("magnitude:0.3", progress=False)
        for name, state in result.layers.items():
            assert state.sparsity == pytest.approx(0.3, abs=0.01)
            assert torch.equal(state.weight, weights[name].masked_fill(state.pruned, 0.0)), name
        results[kind] = result
    check_same(benchmark, prompt, results, tmp_path)


def test_bench_runs_it_in_its_own_environment(tmp_path):
    compressor = JointCompressor.from_pretrained("tiny-llama")
    compressor.compress("rtn:q4_k", progress=False).save_pretrained(tmp_path / "out", "gguf")
    load = bench.Load(prompt=32, generate=8, repeats=1, timeout=120)
    (speed,) = bench.measure(tmp_path / "out", [bench.engine_of(f"llama.cpp={PYTHON}")], load)
    assert (speed.status, speed.reason) == ("ok", None)
    assert speed.version and speed.prompt_rate > speed.generate_rate > 0
    # neither torch nor what the process held that started it
    assert 10e6 < speed.peak_bytes < 300e6


def test_tokenizers_agree(benchmark, tmp_path):
    """Of every kind that has a name; the model behind them reads nothing."""
    kinds = benchmark.tokenizers()
    jobs, expected = [], []
    for name, tokenizer in kinds.items():
        model = benchmark.build("llama")
        compressor = JointCompressor(model, processor=tokenizer)
        result = compressor.compress("rtn(bits=4, group_size=32)", format="gguf", progress=False)
        result.save_pretrained(tmp_path / name, "gguf")
        jobs.append({"folder": str(tmp_path / name), "prompt": [0, 1], "texts": benchmark.TEXTS})
        expected.append([tokenizer(text)["input_ids"] for text in benchmark.TEXTS])
    answers = benchmark.ask(jobs, tmp_path)
    for name, answer, tokens in zip(kinds, answers, expected, strict=True):
        assert answer.get("tokens") == tokens, (name, answer.get("error"))


def test_the_data_says_what_is_so(tmp_path):
    trial = module("engines")
    wanted = {
        Case("gguf"),
        Case("gguf", "", 4, 64),
        Case("gguf", "", 4, 32, symmetric=False),
        Case("gguf", SEVERAL),
    }
    samples = [sample for sample in trial.samples() if sample.case in wanted]
    assert len(samples) == len(wanted)
    entry = trial.try_engines(["llama.cpp"], samples, tmp_path / "scratch")["llama.cpp"]
    known = engines.engine("llama.cpp")
    for row in entry["results"]:
        case = engines.case_of(row)
        assert (row["verdict"] == "ok") and known.loads(case), (str(case), row["verdict"])
