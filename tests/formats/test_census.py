"""A sample of the census: what the data says loads, loads in fresh processes.

`make census` tries every architecture; here a few of each kind are tried again.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_order.formats import proven

FILE = Path(__file__).parents[2] / "benchmarks" / "census.py"
SAMPLE = [
    "AlbertForMaskedLM",
    "BartForCausalLM",
    "BertForSequenceClassification",
    "BloomForCausalLM",
    "CLIPModel",
    "Dinov2ForImageClassification",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma3ForCausalLM",
    "GptOssForCausalLM",
    "LlamaModel",
    "MambaForCausalLM",
    "MixtralForCausalLM",
    "ModernBertForMaskedLM",
    "OPTForCausalLM",
    "Qwen3MoeForCausalLM",
    "ResNetForImageClassification",
    "RwkvForCausalLM",
    "ViTForImageClassification",
]


@pytest.fixture(scope="module")
def census():
    """The module benchmarks/census.py."""
    spec = importlib.util.spec_from_file_location("census", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sample_loads_as_the_data_says(census, tmp_path):
    known = proven.census()["classes"]
    names = [name for name in SAMPLE if name in known]
    assert len(names) >= 18
    folder = tmp_path / "models"
    census.build(folder, names)
    stock = [case for case in census.CASES if case != "sparse"]
    for before, cases in [([FILE], stock), (["-c", census.IMPORT_FIRST, FILE], ["sparse"])]:
        subprocess.run([sys.executable, *before, "load", folder, *cases], check=True)
    for name in names:
        answer = json.loads((folder / name / "build.json").read_text())
        for case, verdict in known[name].items():
            file = folder / name / f"{case}.json"
            now = json.loads(file.read_text()) if file.exists() else answer[case]
            assert (now == "ok") == (verdict == "ok"), (name, case, verdict, now)


def test_a_folder_that_computes_something_else_is_found(census, tmp_path):
    folder = tmp_path / "models"
    census.build(folder, ["LlamaModel"])
    file = folder / "LlamaModel" / "dense" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))
    census.load(folder, ["dense", "compressed-tensors"])
    verdicts = {
        case: json.loads((folder / "LlamaModel" / f"{case}.json").read_text())
        for case in ("dense", "compressed-tensors")
    }
    assert verdicts["dense"].startswith("ValueError: outputs differ by")
    assert verdicts["compressed-tensors"] == "ok"


def test_the_classes_that_most_people_use_come_first(census):
    classes = census.classes(None)
    assert classes[0] == "LlamaForCausalLM"
    assert len(set(classes)) == len(classes) > 1000
    assert set(SAMPLE) <= set(classes)
