"""Running the program in this process, and one saved model for the commands that only read."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import transformers

from optimum_order.cli import main


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def program(capsys):
    """Run `optimum-order` with these arguments: its exit code, stdout and stderr."""
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


@pytest.fixture(scope="session")
def saved(tiny_llama_folder, text_file, tmp_path_factory) -> Path:
    """`tiny_llama_folder` after `wanda:0.5 > gptq:4`, measured and saved. Do not write into it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    arguments = f"--calibration {text_file} --calibration-samples 4 --sequence-length 64 --evaluate {text_file}".split()
    with pytest.raises(SystemExit) as end:
        main(
            [
                "export",
                str(tiny_llama_folder),
                str(folder),
                "--order",
                "wanda:0.5 > gptq:4",
                *arguments,
            ]
        )
    assert not end.value.code
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A copy of `saved`, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copied"))
