"""Engines run in processes of their own; whatever happens there becomes one row."""

import json
import os
import stat
import sys
import time
from pathlib import Path

import pytest

from optimum_order import JointCompressor, bench
from optimum_order.bench import ENGINES, Load, engine_of, measure
from optimum_order.errors import ArtifactError, OptimumOrderError

LOAD = Load(prompt=8, generate=4, repeats=1, threads=1, timeout=120)
HERE = [(ENGINES["transformers"], sys.executable)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """tiny-llama in a format that needs an import, and as GGUF."""
    pytest.importorskip("gguf")
    root = tmp_path_factory.mktemp("saved")
    compressor = JointCompressor.from_pretrained("tiny-llama")
    result = compressor.compress("rtn(bits=4, group_size=32)", format="gguf", progress=False)
    for format in ("gguf", "coded"):
        result.save_pretrained(root / format, format)
    return root


def python(tmp_path, text):
    """A program in the place of a Python, which runs a script on the file of the job."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\nimport json, sys, time\njob = sys.argv[-1]\n{text}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_transformers_runs_what_needs_an_import_and_what_is_gguf(folders):
    for format in ("coded", "gguf"):
        (speed,) = measure(folders / format, HERE, LOAD)
        assert (speed.status, speed.reason) == ("ok", None), format
        assert speed.version and speed.device in ("cpu", "cuda")
        assert speed.prompt_rate > 0 and speed.generate_rate > 0 and speed.load_seconds > 0
        # torch and transformers alone hold more, and a model of 8 MB not much more
        assert 150e6 < speed.peak_bytes < 2e9, format


def test_an_engine_that_cannot_read_the_folder_is_not_started(folders):
    (speed,) = measure(folders / "coded", [(ENGINES["llama.cpp"], "/nowhere")], LOAD)
    assert speed.status == "not run" and "--format gguf" in speed.reason
    (speed,) = measure(folders / "gguf", [(ENGINES["vllm"], "/nowhere")], LOAD)
    assert speed.status == "not run" and "safetensors only" in speed.reason


def test_an_engine_that_is_not_installed_says_what_to_type(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    (speed,) = measure(folders / "gguf", [(ENGINES["llama.cpp"], sys.executable)], LOAD)
    assert (speed.status, speed.reason) == ("not installed", "pip install llama-cpp-python")
    # in another environment, the worker finds out
    other = python(tmp_path, "sys.path.clear()\nimport os\nos._exit(3)")
    (speed,) = measure(folders / "gguf", [(ENGINES["llama.cpp"], other)], LOAD)
    assert speed.status == "failed" and "exit code 3" in speed.reason
    missing = python(
        tmp_path, 'open(json.load(open(job))["answer"], "w").write(\'{"missing": "llama_cpp"}\')'
    )
    (speed,) = measure(folders / "gguf", [(ENGINES["llama.cpp"], missing)], LOAD)
    assert (speed.status, speed.reason) == (
        "not installed",
        f"{missing} -m pip install llama-cpp-python",
    )


def test_the_last_words_of_a_process_that_dies_are_the_reason(folders, tmp_path):
    program = python(tmp_path, "print('no such\\n  instruction')\nsys.exit(4)")
    (speed,) = measure(folders / "gguf", [(ENGINES["llama.cpp"], program)], LOAD)
    assert speed.status == "failed"
    assert speed.reason == "its process ended with exit code 4: no such instruction"


def test_a_process_that_takes_too_long_is_stopped_with_what_it_started(folders, tmp_path):
    number = tmp_path / "number"
    program = python(
        tmp_path,
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(number)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)",
    )
    begin = time.monotonic()
    load = Load(prompt=8, generate=4, timeout=2)
    (speed,) = measure(folders / "gguf", [(ENGINES["llama.cpp"], program)], load)
    assert time.monotonic() - begin < 30
    assert speed.status == "failed" and "more than 2 s; give a longer --timeout" in speed.reason
    child = int(number.read_text())
    for _ in range(50):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        # a zombie that nobody has waited for yet is dead too
        with open(f"/proc/{child}/stat") as stat_:
            if stat_.read().rpartition(")")[2].split()[0] == "Z":
                return
        time.sleep(0.1)
    raise AssertionError("the child runs on")


def test_the_same_words_go_to_every_engine(folders, tmp_path):
    copy = tmp_path / "job.json"
    program = python(tmp_path, f"open({str(copy)!r}, 'w').write(open(job).read())")
    (speed,) = measure(folders / "gguf", [(ENGINES["llama.cpp"], program)], LOAD)
    assert speed.reason == "its process left no answer"
    job = json.loads(copy.read_text())
    assert len(job["prompt"]) == 8 and all(0 <= word < 4096 for word in job["prompt"])
    assert len(set(job["prompt"])) == 8
    assert (job["gguf_file"], job["import_first"]) == ("model.gguf", None)


_FAKE_VLLM = """
import json, os, time
words = []

class SamplingParams:
    def __init__(self, **options):
        self.options = options

class LLM:
    def __init__(self, folder, **options):
        assert os.path.isfile(os.path.join(folder, "config.json"))
        words.append(options | {name: os.environ[name] for name in (
            "OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING")})

    def generate(self, prompts, parameters, use_tqdm):
        (prompt,) = prompts
        tokens = parameters.options["max_tokens"]
        words.append([len(prompt["prompt_token_ids"]), tokens])
        with open(os.environ["FAKE_VLLM_SAID"], "w") as file:
            json.dump(words, file)
        time.sleep(0.1 * tokens)
"""
"""Takes a tenth of a second for each token that it makes."""


def test_vllm_reads_at_once_and_generates_in_the_threads_it_is_given(
    folders, tmp_path, monkeypatch
):
    (tmp_path / "vllm.py").write_text(_FAKE_VLLM)
    said = tmp_path / "said.json"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_VLLM_SAID", str(said))
    other = tmp_path / "python"  # of another environment
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    (speed,) = measure(folders / "coded", [(ENGINES["vllm"], str(other))], LOAD)
    assert (speed.status, speed.reason) == ("ok", None)
    options, *calls = json.loads(said.read_text())
    assert calls == [[8, 1], [8, 5]] * 2  # once to warm up
    assert options["OMP_NUM_THREADS"] == "1"
    assert options["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert options["max_model_len"] == 13 and options["max_num_seqs"] == 1
    assert speed.generate_rate == pytest.approx(10, rel=0.3)
    assert speed.prompt_rate == pytest.approx(80, rel=0.3)


def test_folders_that_hold_no_model_are_refused(folders, tmp_path):
    cases = [
        (tmp_path / "nowhere", "There is no folder"),
        (tmp_path, "has no config.json"),
    ]
    for folder, message in cases:
        with pytest.raises(ArtifactError, match=message):
            measure(folder, HERE, LOAD)
    (tmp_path / "config.json").write_text('{"vocab_size": 4}')
    with pytest.raises(ArtifactError, match="or one GGUF file, got neither"):
        measure(tmp_path, HERE, LOAD)
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ArtifactError, match=r"one GGUF file, got a.gguf, b.gguf"):
        measure(tmp_path, HERE, LOAD)
    (tmp_path / "b.gguf").unlink()
    (tmp_path / "config.json").write_text('{"vocab_size": "4"}')
    with pytest.raises(ArtifactError, match="names no vocab_size"):
        measure(tmp_path, HERE, LOAD)
    with pytest.raises(ArtifactError, match="reads 1024 tokens at most, got 1000 of a prompt and"):
        measure(folders / "gguf", HERE, Load(prompt=1000, generate=30))


def test_engines_are_named_with_or_without_a_python(tmp_path):
    assert engine_of("vllm") == (ENGINES["vllm"], sys.executable)
    assert engine_of(f"llama.cpp={sys.executable}")[1] == sys.executable
    relative = os.path.relpath(sys.executable)  # engines are started in another folder
    started = Path(engine_of(f"vllm={relative}")[1])
    assert started.is_absolute() and started.samefile(sys.executable)
    with pytest.raises(OptimumOrderError, match=r"Unknown engine 'lama.cpp'. Did you mean 'llama"):
        engine_of("lama.cpp")
    with pytest.raises(OptimumOrderError, match="is no program; give the python of the"):
        engine_of(f"llama.cpp={tmp_path}")


def test_numbers_are_one_or_more():
    for name in ("prompt", "generate", "repeats", "threads", "timeout"):
        with pytest.raises(OptimumOrderError, match=f"'{name}' must be at least 1, got 0"):
            Load(**{name: 0})
