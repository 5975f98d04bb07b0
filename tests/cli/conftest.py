"""The program in this process and in one of its own, and a saved model for commands that read."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import transformers

from optimum_order.cli import main, status


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def program(capsys, monkeypatch):
    """Run `optimum-order` with these arguments: its exit code, stdout and stderr."""
    # whether it says that it begins would depend on the load of the machine
    monkeypatch.setattr(status, "PATIENCE", 3600)
    verbosity = transformers.utils.logging.get_verbosity()

    def run(*arguments) -> Outcome:
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return Outcome(code, *capsys.readouterr())

    yield run
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def start(fork):
    """Start `optimum-order` with these arguments in a process of its own."""

    def start(*arguments):
        words = [str(argument) for argument in arguments]
        return fork(f"from optimum_order.cli import main; main({words!r})")

    return start


@pytest.fixture(scope="session")
def saved(tiny_llama_folder, text_file, tmp_path_factory) -> Path:
    """`tiny_llama_folder` after `wanda:0.5 > gptq:4`, measured and saved. Do not write into it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    small = ["--calibration-samples", "4", "--sequence-length", "64"]
    data = ["--calibration", str(text_file), "--evaluate", str(text_file)]
    order = ["--order", "wanda:0.5 > gptq:4"]
    with pytest.raises(SystemExit) as end:
        main(["compress", str(tiny_llama_folder), str(folder), *order, *small, *data])
    assert not end.value.code
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A copy of `saved`, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copied"))
