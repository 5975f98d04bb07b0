"""A package of plug-ins by somebody else, installed by pip and used in processes of its own."""

import json
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(install, tmp_path_factory):
    """`run("-m", "pytest", ...)`: the output of python in a process that has the package."""
    source = shutil.copytree(HERE / "package", tmp_path_factory.mktemp("source") / "package")
    python = install(source)
    shutil.rmtree(source)
    return python


@pytest.fixture(scope="module")
def results(run, tiny_llama_folder, text_file, tmp_path_factory):
    """What `use.py` says of each order."""
    orders = {
        "rounded": "powers",
        "pruned": "wanda:0.5 > powers:3",
        "shuffled": "shuffle",
        "narrowed": "narrow",
        "narrowed and pruned": "narrow(fraction=0.25) > wanda:0.5 > gptq:4",
        "coarse": "rtn(bits=2, group_size=32)",
        "refitted": "rtn(bits=2, group_size=32) > mend",
        "pruned, coarse and refitted": "wanda:0.5 > rtn(bits=3, symmetric=false) > mend",
        "all kinds": "shuffle > narrow(fraction=0.25) > wanda:0.5 > powers:4",
        "narrowed and refitted": "narrow(fraction=0.25) > rtn(bits=2, group_size=32) > mend",
        "narrowed and coarse": "narrow(fraction=0.25) > rtn(bits=2, group_size=32)",
    }
    folder = tmp_path_factory.mktemp("saved")
    output = run(HERE / "use.py", tiny_llama_folder, text_file, folder, *orders.values())
    lines = [json.loads(line) for line in output.splitlines()]
    return dict(zip(orders, lines, strict=True))


def test_the_plug_ins_keep_the_contracts(run, tmp_path):
    contracts = shutil.copy(HERE / "package" / "contracts.py", tmp_path)
    assert "36 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", contracts)


def test_every_result_loads_as_it_was_measured_and_verifies(results):
    for name, result in results.items():
        assert result["problems"] == [], name
        assert result["as_measured"], name


def test_a_statistic_a_grid_and_a_backend_are_one_file_each(results):
    rounded = results["rounded"]
    assert rounded["order"] == "powers:4"
    assert rounded["sizes"] <= 8, "seven powers of two, and zero"
    assert 0 < rounded["distance"] < 0.5
    pruned = results["pruned"]
    assert pruned["sizes"] <= 4 and pruned["zeros"] >= 0.5


def test_a_transform_leaves_the_function_alone(results):
    shuffled = results["shuffled"]
    assert not shuffled["same_rows"], "or nothing was done"
    assert shuffled["distance"] < 1e-5


def test_a_reshaper_makes_a_stock_model_smaller(results):
    narrowed = results["narrowed"]
    assert narrowed["intermediate_size"] == 64
    assert narrowed["shapes"] == [[64, 64], [64, 64]]
    further = results["narrowed and pruned"]
    assert further["shapes"] == [[96, 64], [64, 96]]
    assert further["zeros"] >= 0.5


def test_a_recovery_comes_closer_to_the_original(results):
    coarse, refitted = results["coarse"], results["refitted"]
    assert refitted["distance"] < coarse["distance"]
    assert refitted["sizes"] == coarse["sizes"] and refitted["zeros"] == coarse["zeros"]
    assert results["pruned, coarse and refitted"]["zeros"] >= 0.5
    after_cuts, alone = results["narrowed and refitted"], results["narrowed and coarse"]
    assert after_cuts["distance"] < alone["distance"]
    assert after_cuts["shapes"] == alone["shapes"] == [[96, 64], [64, 96]]


def test_all_kinds_follow_each_other(results):
    everything = results["all kinds"]
    assert everything["intermediate_size"] == 96
    assert everything["zeros"] >= 0.5


CRATES = """
import sys
import torch
from optimum_order import JointCompressor
from optimum_order.artifact.convert import convert
from optimum_order.artifact.verify import verify
from transformers import AutoModelForCausalLM

model, folder = sys.argv[1:]
compressed = JointCompressor.from_pretrained(model).compress("rtn:4", progress=False)
assert compressed.save_pretrained(f"{folder}/crate", format="crated") == "crated"
assert verify(f"{folder}/crate") == []
convert(f"{folder}/crate", f"{folder}/dense", "dense")
loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/dense", dtype="auto")
for name, tensor in compressed.model.state_dict().items():
    assert torch.equal(loaded.state_dict()[name], tensor), name
"""


def test_a_container_is_one_file(run, tiny_llama_folder, tmp_path):
    run("-c", CRATES, tiny_llama_folder, tmp_path)
    assert [file.name for file in (tmp_path / "crate").glob("model*")] == ["model.crate"]
