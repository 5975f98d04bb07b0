"""Everything a newcomer is told to run does run: the examples, the demo, and the code in the README."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINING = ("train_tiny_llama.py", "train_tiny_vision.py")  # take minutes or hours
EXAMPLES = sorted(
    file.name for file in (ROOT / "examples").glob("*.py") if file.name not in TRAINING
)


def run(*command, folder) -> str:
    """Run Python with these arguments in an empty folder."""
    # One's own folder is on the path of a script; the repository's need not be, the package is installed.
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(name, tmp_path):
    assert run(ROOT / "examples" / name, folder=tmp_path)


@pytest.mark.parametrize("name", [*EXAMPLES, *TRAINING])
def test_every_example_says_how_to_run_it(name):
    first, *_ = (ROOT / "examples" / name).read_text(encoding="utf-8").split('"""', 2)[1:]
    assert f"python examples/{name}" in first


def test_the_training_script_explains_itself(tmp_path):
    assert "--minutes" in run(ROOT / "examples" / "train_tiny_llama.py", "--help", folder=tmp_path)


@pytest.mark.parametrize(("model", "better_than"), [("vit", 0.35), ("resnet", 0.8)])
def test_a_vision_model_is_trained_and_saved(model, better_than, tmp_path):
    run(
        ROOT / "examples" / "train_tiny_vision.py",
        model,
        "--epochs",
        "4",
        "--output",
        "out",
        folder=tmp_path,
    )
    shipped = ROOT / "optimum_order" / "assets" / f"tiny-{model}"
    for name in ("config.json", "preprocessor_config.json"):
        made, meant = (
            json.loads((folder / name).read_text()) for folder in (tmp_path / "out", shipped)
        )
        version = {"transformers_version": None}  # of the library that wrote it
        assert made | version == meant | version
    trained, recipe = (
        json.loads((f / "recipe.json").read_text()) for f in (tmp_path / "out", shipped)
    )
    assert set(trained) == set(recipe)
    assert better_than < trained["accuracy_held_out"] < recipe["accuracy_held_out"]


def test_the_demo(tiny_llama_folder, text_file, tmp_path):
    small = ["--model", tiny_llama_folder, "--calibration", text_file, "--calibration-samples", 4]
    text = run(ROOT / "benchmarks" / "demo.py", *small, "--evaluate", text_file, folder=tmp_path)
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert list(rows) == [
        "(uncompressed)",
        "wanda:0.5",
        "gptq:4",
        "wanda:0.5 > gptq:4",
        "gptq:4 > wanda:0.5",
        "magnitude:0.5 > gptq:3",
        "gptq:3 > magnitude:0.5",
    ]
    perplexity = {order: float(line.split("│")[2]) for order, line in rows.items() if ">" in order}
    kept = re.search(r"the lowest perplexity is kept: (.*)", text).group(1)
    assert perplexity[kept] == min(perplexity.values())
    assert (tmp_path / "demo-output" / "optimum_order.json").exists()
    assert "The import statement" in text


def test_no_correction_makes_a_layer_of_the_embedded_model_worse(tmp_path):
    text = run(ROOT / "benchmarks" / "layer_error.py", "--samples", "4", folder=tmp_path)
    assert "28 layers, 0 where a correction made it worse." in text


def test_the_code_in_the_readme_runs(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:  # the second one loads what the first one saved, in a process of its own
        (tmp_path / "code.py").write_text(block)
        assert run("code.py", folder=tmp_path)


def test_the_commands_in_the_readme_run(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^(optimum-order (?:export|inspect|verify|backends)[^\n#]*)", readme, flags=re.MULTILINE
    )
    assert len(commands) == 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        small = " --calibration-samples 8" if " export " in command else ""
        done = subprocess.run(
            command + small,
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout, f"{command}:\n{done.stdout}\n{done.stderr}"
