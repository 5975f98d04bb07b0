"""Everything a newcomer is told to run does run: examples, demo, and the code in the README."""

import json
import re
import shlex
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TRAINING = ("train_tiny_llama.py", "train_tiny_vision.py")  # take minutes or hours
EXAMPLES = sorted(
    file.name for file in (ROOT / "examples").glob("*.py") if file.name not in TRAINING
)
PROGRAM = "from optimum_order.cli import main; main()"
# The built-in text in small: the README measures on all of it, which takes minutes.
SMALL = """
from optimum_order.data import text
topics = text.reference_topics()
text.reference_topics = lambda: topics[:8]
text.standard_library_docstrings = lambda: topics[8:40]
"""
# The folder of a script is on its path; the repository need not be: the package is installed.
SCRIPT = """
import os, runpy
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def run(fork):
    """Run a script, or other code, with arguments in an empty folder: its output."""

    def run(*words, code: str = SCRIPT) -> str:
        child = fork(f"sys.argv = {[str(word) for word in words]!r}\n{code}")
        ended = child.end()
        assert ended == 0, (
            f"{words} ended with {ended}:\n{child.output('out')}\n{child.output('err')}"
        )
        return child.output("out")

    return run


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(run, name):
    assert run(ROOT / "examples" / name)


def test_every_cell_of_the_notebook_runs(run):
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3 and not any(cell["outputs"] for cell in cells)
    output = run(code="\n".join("".join(cell["source"]) for cell in cells))
    first, second, text = output.splitlines()[:3]
    assert first.startswith("wanda") and second.startswith("gptq") and "import statement" in text


def test_every_example_says_how_to_run_it():
    for name in [*EXAMPLES, *TRAINING]:
        docstring = (ROOT / "examples" / name).read_text(encoding="utf-8").split('"""')[1]
        assert f"python examples/{name}" in docstring


def test_the_training_script_explains_itself(run):
    assert "--minutes" in run(ROOT / "examples" / "train_tiny_llama.py", "--help")


@pytest.mark.parametrize(("model", "better_than"), [("vit", 0.35), ("resnet", 0.8)])
def test_a_vision_model_is_trained_and_saved(run, model, better_than, tmp_path):
    script = ROOT / "examples" / "train_tiny_vision.py"
    run(script, model, "--epochs", "4", "--output", "out")
    shipped = ROOT / "optimum_order" / "assets" / f"tiny-{model}"

    def both(file):
        return (json.loads((folder / file).read_text()) for folder in (tmp_path / "out", shipped))

    for file in ("config.json", "preprocessor_config.json"):
        made, expected = both(file)
        version = {"transformers_version": None}  # of the library that wrote the file
        assert made | version == expected | version
    trained, recipe = both("recipe.json")
    assert set(trained) == set(recipe)
    assert better_than < trained["accuracy_held_out"] < recipe["accuracy_held_out"]


def test_the_demo(run, tiny_llama_folder, text_file, tmp_path):
    small = ["--model", tiny_llama_folder, "--calibration", text_file, "--calibration-samples", 4]
    text = run(ROOT / "benchmarks" / "demo.py", *small, "--evaluate", text_file)
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
    best = re.search(r"the lowest perplexity is kept: (.*)", text).group(1)
    assert perplexity[best] == min(perplexity.values())
    assert (tmp_path / "demo-output" / "optimum_order.json").exists()
    assert "The import statement" in text


def test_no_correction_makes_a_layer_of_the_embedded_model_worse(run):
    text = run(ROOT / "benchmarks" / "layer_error.py", "--samples", "4")
    assert "28 layers, 0 where a correction made it worse." in text


def readme(pattern: str, flags: int = re.MULTILINE) -> list[str]:
    """The matches of a pattern in the README, of which there must be some."""
    matches = re.findall(pattern, (ROOT / "README.md").read_text(encoding="utf-8"), flags=flags)
    assert matches
    return matches


def test_the_code_in_the_readme_runs(run, tmp_path):
    """In order, each block in a process of its own: later ones load what earlier ones saved."""
    for number, block in enumerate(readme(r"```python\n(.*?)```", re.DOTALL)):
        script = tmp_path / f"block_{number}.py"
        script.write_text(block)
        assert run(script, code=SMALL + SCRIPT)


def test_the_commands_in_the_readme_run(run):
    names = "compress|export|inspect|verify|methods|backends"
    for command in readme(rf"^optimum-order ((?:{names})[^\n#]*)"):
        words = shlex.split(command)
        small = ["--calibration-samples", 8] if words[0] in ("compress", "export") else []
        assert run("optimum-order", *words, *small, code=SMALL + PROGRAM), command
