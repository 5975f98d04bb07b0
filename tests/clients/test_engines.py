"""vLLM on the CPU, in the environment that `make engines` makes: what the data says is so.

The benchmark tries all; here a few of each kind are tried again, and a folder that was tampered with.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from optimum_order import JointCompressor, bench
from optimum_order.formats import engines
from optimum_order.formats.engines import FUSED, OK, READ, Case

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(not PYTHON.exists(), reason="run by make engines"),
]


@pytest.fixture(scope="module")
def benchmark():
    """The module benchmarks/engines.py."""
    spec = importlib.util.spec_from_file_location(
        "engines_benchmark", ROOT / "benchmarks" / "engines.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def is_read(verdict):
    return verdict == OK or verdict.startswith(READ)


def test_vllm_loads_and_refuses_as_the_data_says(benchmark, tmp_path):
    wanted = {
        Case("dense"),
        Case("compressed-tensors", "", 4, 64),
        Case("compressed-tensors", "", 3, 64),
        Case("compressed-tensors", FUSED),
        Case("gptq", "", 4, 64),
        Case("gptq", "", 4, 64, symmetric=False),
        Case("compressed-tensors", "", 8, inputs="int8 per token"),
        Case("compressed-tensors", "", 4, 32, inputs="int8 per token"),
        Case("compressed-tensors", "", 8, inputs="int8 per tensor"),
        Case("compressed-tensors", "", 4, 128, inputs="int8 per tensor"),
        Case("compressed-tensors", "fp8", inputs="fp8 per token"),
    }
    samples = [sample for sample in benchmark.samples() if sample.case in wanted]
    assert len(samples) == len(wanted)
    entry = benchmark.try_engines(["vllm"], samples, tmp_path / "scratch")["vllm"]
    known = engines.engine("vllm")
    assert entry["fused"]["LlamaForCausalLM"] == known.fused["LlamaForCausalLM"]
    for row in entry["results"]:
        case = engines.case_of(row)
        assert is_read(row["verdict"]) == known.loads(case), (str(case), row["verdict"])
    read = [row for row in entry["results"] if is_read(row["verdict"])]
    assert len(read) >= 7


def logprobs(benchmark, folder, prompt, scratch):
    """What vLLM computes of a folder."""
    job = {"folder": str(folder), "prompt": prompt, "import_first": None, "packages": ()}
    job |= {"answer": str(scratch / "answer.json")}
    benchmark.answers("vllm", [job], scratch)
    return json.loads((scratch / "answer.json").read_text())


def test_codes_that_mean_something_else_are_noticed(benchmark, tmp_path):
    case = Case("compressed-tensors", "", 4, 64)
    (sample,) = [sample for sample in benchmark.samples() if sample.case == case]
    prompt, expected = benchmark.build(sample, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 2
    save_file(tensors, file, {"format": "pt"})
    answer = logprobs(benchmark, tmp_path / "out", prompt, tmp_path)
    assert benchmark.verdict(answer, expected)["verdict"].startswith("wrong")


@pytest.mark.parametrize(
    "order",
    [
        "wanda:0.3 > gptq(bits=4, group_size=64, targets=*.mlp.*)",
        "wanda:0.3 > gptq(bits=8, group_size=-1) > activations:8",
    ],
)
def test_what_is_saved_for_vllm_loads_there(benchmark, tmp_path, order):
    """In bfloat16, as most models are."""
    compressor = JointCompressor.from_pretrained("tiny-llama", calibration_samples=8)
    compressed = compressor.compress(order, engine="vllm", progress=False)
    assert compressed.save_pretrained(tmp_path / "out", engine="vllm") == "compressed-tensors"
    prompt = compressor.source.processor(benchmark.PROMPT)["input_ids"]
    expected = benchmark.logprobs(compressed.model, prompt)
    answer = logprobs(benchmark, tmp_path / "out", prompt, tmp_path)
    assert is_read(benchmark.verdict(answer, expected)["verdict"])


def test_bench_runs_vllm_in_its_own_environment(tmp_path):
    compressor = JointCompressor.from_pretrained("tiny-llama")
    compressed = compressor.compress("rtn(bits=4, group_size=64)", engine="vllm", progress=False)
    compressed.save_pretrained(tmp_path / "out", engine="vllm")
    load = bench.Load(prompt=64, generate=8, repeats=1, timeout=300)
    (speed,) = bench.measure(tmp_path / "out", [bench.engine_of(f"vllm={PYTHON}")], load)
    assert (speed.status, speed.reason) == ("ok", None)
    assert speed.version and speed.prompt_rate > speed.generate_rate > 0
    # torch and vLLM themselves, and a gigabyte at most for keys and values
    assert 500e6 < speed.peak_bytes < 6e9
