"""Run the documentation as a reader does who pastes it: every command and Python block of a page.

    python tests/docs/pages.py
    python tests/docs/pages.py docs/guides/orders.md README.md --log logs

A page is run from top to bottom in a folder of its own, which holds an artifact `out` to begin with, as
after the quick start. What names a model of the Hub, a file of the
reader's or another program is listed and not run. The script ends in 1 if anything failed, and
prints what.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from test_docs import PAGES, ROOT

BLOCK = re.compile(
    r"^```(?P<language>bash|python)(?P<title> title=\"[^\"]+\")?\n(?P<code>.*?)^```", re.M | re.S
)
FOREIGN = re.compile(
    r"\b(meta-llama|some|me|my-org|namespace|your)/|my-|text\.txt|chats\.jsonl|model\.gguf|wikitext2|env/bin|lm_eval"
    r"|^optimum-order push",
    re.M,
)
"""What only the reader has, or what a page made up."""
MAKE = ("compress", "export", "convert", "study")
"""Commands whose second argument is a folder that they make."""
START = ("compress", "tiny-llama", "out", "--order", "rtn:4", "--quiet")
LIMIT = 1800  # seconds of one piece


def pieces(page: Path) -> Iterator[tuple[str, str]]:
    """Yield each command, and each Python block, of a page: its language and its text."""
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["title"]:  # a file of a plugin, which tests/plugins installs
            continue
        if block["language"] == "python":
            yield "python", block["code"]
            continue
        for line in block["code"].replace("\\\n", " ").splitlines():
            command = line.partition(" #")[0].strip()
            if command.startswith("optimum-order "):
                yield "bash", command


def run(page: Path, folder: Path, log: Path | None) -> Iterator[tuple[str, str]]:
    """Run a page.

    Args:
        page: A Markdown file.
        folder: An empty folder.
        log: Where the output of each piece goes, or None.

    Yields:
        What became of each piece, "ok", "failed" or "not run", and its first line.
    """
    earlier = ""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for number, (language, text) in enumerate(pieces(page)):
        title = text.strip().splitlines()[0][:100]
        if FOREIGN.search(text):
            yield "not run", title
            continue
        if language == "bash":
            words = shlex.split(text)
            if words[1] in MAKE and len(words) > 3:
                shutil.rmtree(folder / words[3], ignore_errors=True)  # of an earlier command
            command = ["bash", "-c", text]
        else:
            command = [sys.executable, "-c", earlier + text]
        begin = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=LIMIT,
            )
            output, failed = done.stdout, done.returncode != 0
        except subprocess.TimeoutExpired:
            output, failed = f"took more than {LIMIT} s", True
        if log:
            name = f"{page.stem}-{number}.txt"
            (log / name).write_text(f"{text}\n\n{output}", encoding="utf-8")
        if failed:
            yield "failed", f"{title}\n{output[-3000:]}"
        else:
            yield "ok", f"{title} ({time.perf_counter() - begin:.0f} s)"
        if language == "python" and not failed:
            earlier += text  # a later block of the page goes on with its names


def main() -> int:
    """Run the pages and return 1 if a piece failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="all by default")
    parser.add_argument("--log", type=Path, help="a folder for the output of each piece")
    args = parser.parse_args()
    if args.log:
        args.log.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(("ok", "failed", "not run"), 0)
    for page in args.pages or PAGES:
        with tempfile.TemporaryDirectory() as folder:
            program = Path(sys.executable).with_name("optimum-order")
            subprocess.run([program, *START], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            for outcome, line in run(page, Path(folder), args.log):
                counts[outcome] += 1
                print(f"{page.resolve().relative_to(ROOT)}: {outcome}: {line}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return bool(counts["failed"])


if __name__ == "__main__":
    sys.exit(main())
