"""`optimum-order search` and `compress --budget`: one recipe, its evidence, and refusals."""

import json
import shlex
import shutil

import pytest

from optimum_order.artifact import manifest
from optimum_order.files import weight_bytes

SMALL = ["--calibration-samples", "4", "--sequence-length", "64"]


@pytest.fixture
def data(text_file):
    return ["--calibration", text_file, *SMALL]


def weights(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def test_json_says_what_was_chosen_and_the_command_makes_it_again(
    program, tiny_llama_folder, data, tmp_path
):
    out = tmp_path / "out"
    options = [*data, "--format", "compressed-tensors", "--seed", 1]
    done = program("search", tiny_llama_folder, out, "--budget", "4.5 bits", *options, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    keys = {"order", "format", "budget", "met", "reason", "rows", "cost", "command", "output"}
    assert keys <= set(result)
    first = result["rows"][0]
    assert result["order"] == first["order"] and first["difference"] is None
    assert first["bytes"] == weight_bytes(out) and first["bits"] <= 4.5
    assert result["cost"]["compressions"] == sum(row["made"] for row in result["rows"]) <= 3
    assert manifest.load(out)["search"]["order"] == result["order"]
    words = shlex.split(result["command"])
    assert words[:2] == ["optimum-order", "compress"]
    assert "--seed" in words and "--for" not in words
    words[words.index(str(out))] = str(tmp_path / "again")
    assert program(*words[1:]).code == 0
    assert weights(tmp_path / "again") == weights(out)


def test_people_see_the_table_the_reason_and_the_cost(program, tiny_llama_folder, data, tmp_path):
    out = tmp_path / "out"
    limit = ["--max-loss", "5", "--format", "compressed-tensors", "--budget", "6 bits"]
    done = program("compress", tiny_llama_folder, out, *limit, *data)
    assert done.code == 0, done.err
    for words in ("what else fits in these bytes", "Reason: ", "compressions of the model", "why"):
        assert words in done.out
    assert manifest.load(out)["search"]["max_loss"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no work dir is left


def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    program, tiny_llama_folder, data, tmp_path
):
    model, out = tiny_llama_folder, tmp_path / "out"
    budget = ["--budget", "3 bits"]
    for words, message in [
        (["search", model], "A search needs a budget"),
        (["search", model, "--budget", "3 stones"], "Units: B, kB"),
        (["search", model, "--max-loss", "0"], "must be above 0"),
        (["search", model, "--budget", "0.5 bits"], "the smallest is '"),
        (["search", model, "--budget", "1GB"], "nothing needs compressing"),
        (["search", model, *budget, "--for", "vlm"], "Did you mean 'vllm'"),
        (["search", model, *budget, "--format", "zip"], "Unknown format 'zip'"),
        (["search", model, *budget, "--for", "vllm"], "No recipe is as small as 3 bits"),
        (["compress", model, out, "--order", "rtn:4", *budget], "leave '--order' out"),
        (["compress", model, out, "--stages", "rtn:4", *budget], "leave '--stages' out"),
        (["compress", model, out, "--low-memory", *budget], "leave '--low-memory' out"),
        (["compress", model, out, "--dry-run", "--max-loss", "1"], "leave '--dry-run' out"),
        (["compress", model, out, "--resume", *budget], "nothing to resume"),
    ]:
        done = program(*words, *data)
        assert done.code == 2 and not done.out, words
        assert message in done.err.splitlines()[-1], (words, done.err)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_reads_no_weight_and_refuses_what_the_search_would(
    program, tiny_llama_folder, data, tmp_path
):
    empty = tmp_path / "no weights"
    shutil.copytree(tiny_llama_folder, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    out = tmp_path / "out"
    for limit in (["--budget", "3 bits"], ["--max-loss", "0.1"]):
        done = program("search", empty, out, *limit, *data, "--dry-run", "--json")
        assert done.code == 0, done.err
        forecast = json.loads(done.out)["forecast"]
        assert forecast["trials"] >= 3 and 0 < forecast["seconds"] < 3600
    done = program("search", empty, "--budget", "3 bits", *data, "--dry-run")
    assert "Nothing was run. The search at most: 3 trials, about" in done.out
    done = program("search", empty, "--budget", "0.1 bits", *data, "--dry-run")
    assert done.code == 2 and "No recipe is as small as 0.1 bits" in done.err
    assert not out.exists()
