"""The first hour of a new user, typed into a real terminal: what appears, when, and what goes wrong.

    python benchmarks/first_hour.py
    python benchmarks/first_hour.py --checkout FOLDER    # that has a .venv: without clone and install
    python benchmarks/first_hour.py --checkout FOLDER --replace "compress =export " "tiny-llama study=tiny-llama -o study"
                                                         # in the words of version 0.1.0

tmux runs a shell of 100 columns. Each step types a line as a person would, waits for the prompt, and
notes the keys typed, the seconds until something appeared, the seconds until the prompt came back,
the exit code, and whether the screen says what the user needs then. Lines that a person would copy
from the screen, such as the command that resumes, are copied from the screen. `--output FILE` keeps
the rows as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "ready> "
COLUMNS, LINES = 100, 200
NAME = "first-hour"


@dataclasses.dataclass(frozen=True)
class Step:
    """One line that a user types.

    Args:
        goal: What the user wants.
        line: What is typed.
        expected: A regular expression that the screen must match at the end.
        code: The exit code that is right.
        interrupt: A regular expression at which the user presses Ctrl-C.
        timeout: Seconds after which the user gives up.
    """

    goal: str
    line: str
    expected: str
    code: int = 0
    interrupt: str | None = None
    timeout: float = 600


INSTALL = (
    Step("get the code", "git clone -q {root} work && cd work", r"", timeout=120),
    Step(
        "install",
        "make .venv/.installed > install.log 2>&1; tail -n 1 install.log",
        r"",
        timeout=1800,
    ),
)
STEPS = (
    Step("see what there is", "optimum-order --help", r"compress .*\n(.*\n)*.*verify"),
    Step("a typing mistake", "optimum-order compres tiny-llama out", r"[Dd]id you mean", 2),
    Step(
        "the first compressed model",
        'optimum-order compress tiny-llama out --order "wanda:0.5 > gptq:4"',
        r"Saved to out",
    ),
    Step("look at the result", "optimum-order inspect out", r"gptq:4"),
    Step(
        "a format that is none",
        "optimum-order compress tiny-llama out2 --order rtn:4 --format compressed-tensor",
        r"compressed-tensors",
        2,
    ),
    Step(
        "an unquoted >",
        "optimum-order compress tiny-llama out2 --order wanda:0.5 > gptq:4",
        r"Quote the order",
        2,
    ),
    Step(
        "interrupt a long run",
        'optimum-order compress tiny-llama out3 --order "sparsegpt:0.5 > gptq:4" --work-dir run',
        r"--resume",
        130,
        interrupt=r"[1-9]\d*/\d+ \[",
    ),
    Step("resume with the line on the screen", "{resume}", r"Saved to out3"),
    Step(
        "which order is better",
        'optimum-order plan tiny-llama --stages "magnitude:0.5, rtn:4" --calibration-samples 8',
        r"To compress so",
    ),
    Step(
        "a study and its report",
        "optimum-order study tiny-llama study --pruners magnitude --sparsities 0.3,0.5 --quantizers rtn --bits 4 "
        "--calibration-samples 8 --evaluation-samples 8",
        r"report",
    ),
    Step("push to the Hub", "optimum-order push out me/first", r"is at http"),
    Step("the first green test", "python -m pytest -q -n 0 tests/test_order.py", r"\d+ passed"),
)


class Terminal:
    """A shell in tmux.

    Args:
        folder: Where the shell begins.
        environment: Variables of the shell.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self._tmux("kill-session", "-t", NAME, check=False)
        self._tmux(
            "-f", "/dev/null", "new-session", "-d", "-s", NAME, "-x", str(COLUMNS),
            "-y", str(LINES), "-c", str(folder), "bash --norc --noprofile",
        )  # fmt: skip
        variables = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
        self._type(f"export {variables} PS1='$? {PROMPT}'; clear")
        self._wait(rf"^\d+ {PROMPT.strip()}", 20)

    @staticmethod
    def _tmux(*words: str, check: bool = True) -> str:
        command = ["tmux", "-L", NAME, *words]
        return subprocess.run(command, check=check, capture_output=True, text=True).stdout

    def _type(self, line: str) -> None:
        self._tmux("send-keys", "-t", NAME, "-l", line)
        self._tmux("send-keys", "-t", NAME, "Enter")

    def screen(self) -> str:
        """Return the text on the screen."""
        return self._tmux("capture-pane", "-p", "-J", "-t", NAME).rstrip()

    def _wait(self, pattern: str, timeout: float) -> bool:
        """Wait until the screen matches a pattern; return whether it did in time."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if re.search(pattern, self.screen(), re.MULTILINE):
                return True
            time.sleep(0.05)
        return False

    def run(self, step: Step) -> tuple[dict[str, object], str]:
        """Type a step; return its row and the screen at the end."""
        self._tmux("send-keys", "-t", NAME, "-R", "C-l")
        self._tmux("clear-history", "-t", NAME)
        time.sleep(0.3)
        begin = time.monotonic()
        self._type(step.line)
        time.sleep(0.05)
        typed = self.screen()
        first = None
        interrupted = step.interrupt is None
        code = None
        while time.monotonic() - begin < step.timeout:
            screen = self.screen()
            if first is None and len(screen) > len(typed):
                first = time.monotonic() - begin
            if not interrupted and re.search(str(step.interrupt), screen.replace(step.line, "")):
                interrupted = True
                self._tmux("send-keys", "-t", NAME, "C-c")
            last = re.search(rf"^(\d+) {PROMPT.strip()}$", screen.splitlines()[-1].strip())
            if last and time.monotonic() - begin > 0.3:
                code = int(last[1])
                break
            time.sleep(0.05)
        screen = self.screen()
        row = {
            "goal": step.goal,
            "keys": len(step.line) + 1,
            "first_output_s": None if first is None else round(first, 2),
            "seconds": round(time.monotonic() - begin, 1),
            "exit_code": code,
            "as_wanted": code == step.code and re.search(step.expected, screen) is not None,
        }
        return row, screen

    def close(self) -> None:
        """End the shell."""
        self._tmux("kill-server", check=False)


def main() -> None:
    """Type all steps and print a table."""
    args = _arguments()
    hub = _module(ROOT / "tests" / "hub_server.py")
    server = hub.HubServer()
    with tempfile.TemporaryDirectory() as home:
        token = next(token for token, user in hub.TOKENS.items() if user == "me")
        checkout = Path(args.checkout).resolve() if args.checkout else Path(home) / "work"
        environment = {
            "PATH": f"{checkout}/.venv/bin:/usr/local/bin:/usr/bin:/bin",
            "HF_ENDPOINT": server.url,
            "HF_HOME": f"{home}/huggingface",
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        terminal = Terminal(Path(home), environment)
        rows = []
        resume = ""
        try:
            first = () if args.checkout else INSTALL
            for step in (*first, *STEPS):
                step = _in_words(step, args.replace)
                line = step.line.format(root=ROOT, resume=resume)
                if args.checkout and "tests/" in line:
                    line = line.replace("tests/", f"{checkout}/tests/")
                row, screen = terminal.run(dataclasses.replace(step, line=line))
                resume = _resuming(screen) or resume
                rows.append(row)
                print(json.dumps(row), flush=True)
                if not row["as_wanted"]:
                    print(screen, file=sys.stderr, flush=True)
        finally:
            terminal.close()
    print(f"{sum(bool(row['as_wanted']) for row in rows)} of {len(rows)} steps as wanted, ", end="")
    print(f"{sum(int(str(row['keys'])) for row in rows)} keys")
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")


def _in_words(step: Step, replace: list[str]) -> Step:
    """Return a step in the words of another version."""
    for pair in replace:
        old, new = pair.split("=")
        expected = step.expected.replace(old, new)
        step = dataclasses.replace(step, line=step.line.replace(old, new), expected=expected)
    return step


def _resuming(screen: str) -> str | None:
    """Return the command on a screen that resumes a run, as a person would copy it."""
    commands = re.findall(r"to resume: (optimum-order .* --resume.*)", screen)
    return commands[-1].strip() if commands else None


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkout", metavar="FOLDER", help="with a .venv; nothing is installed")
    parser.add_argument("--replace", metavar="OLD=NEW", nargs="+", default=[], help="in all lines")
    parser.add_argument("--output", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
