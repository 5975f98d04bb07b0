"""The program in this process or in one of its own, and a saved model for commands that read."""

import dataclasses
import multiprocessing
import os
import shutil
import time
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


# the output of a process goes to files, so that no pipe can fill up
_RUN = """
import os, sys
for stream, file in ((1, {out!r}), (2, {err!r})):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
from optimum_order.cli import main
main({arguments!r})
"""


class Child:
    """`optimum-order` in a process of its own, forked from one that has imported everything."""

    def __init__(self, context, folder: Path, arguments: list[str]) -> None:
        self._out = folder / "out"
        self._err = folder / "err"
        names = {"out": str(self._out), "err": str(self._err)}
        code = _RUN.format(**names, arguments=arguments)
        self._process = context.Process(target=exec, args=(code, {}))
        self._process.start()

    def wait_until(self, condition) -> None:
        while not condition():
            assert self._process.is_alive(), f"the process has ended: {self._err.read_text()}"
            time.sleep(0.001)

    def end(self, signal: int) -> Outcome:
        """Send a signal, and wait for the end."""
        os.kill(self._process.pid, signal)
        self._process.join(120)
        return Outcome(self._process.exitcode, self._out.read_text(), self._err.read_text())


@pytest.fixture(scope="session")
def forked():
    """A server that forks processes which need not import anything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["optimum_order.compressor", "transformers.models.llama.modeling_llama"]
    )
    return context


@pytest.fixture
def start(forked, tmp_path_factory):
    """Start `optimum-order` with these arguments in a process of its own."""
    return lambda *arguments: Child(
        forked, tmp_path_factory.mktemp("child"), [str(argument) for argument in arguments]
    )


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
