"""The longest silence of a command on a terminal: what somebody stares at.

    python benchmarks/silence.py -- optimum-order compress tiny-llama out --order "wanda:0.5 > gptq:4"

Runs the command under a pseudo-terminal and notes when anything appears. Prints the seconds before
the first output, the longest gap between two, what was on the screen last before that gap, how long
the process took to end after its last output, and the exit code.
"""

import argparse
import json
import os
import pty
import re
import sys
import time

COLOR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(command: list[str]) -> dict[str, object]:
    """Return what a terminal sees of a command."""
    begin = last = time.monotonic()
    process, terminal = pty.fork()
    if not process:
        os.environ |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        os.execvp(command[0], command)
    text, first, longest, before = "", None, 0.0, ""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            part = b""
        now = time.monotonic()
        if not part:  # nothing more comes: the process is taken down
            break
        first = now - begin if first is None else first
        if now - last > longest:
            longest = now - last
            lines = re.split(r"[\r\n]+", COLOR.sub("", text))
            before = next((line.strip() for line in reversed(lines) if line.strip()), "")
        last = now
        text = (text + part.decode(errors="replace"))[-4000:]
    _, status = os.waitpid(process, 0)
    return {
        "command": " ".join(command),
        "first output, seconds": round(first or 0, 2),
        "longest silence, seconds": round(longest, 2),
        "on the screen then": before,
        "seconds from the last output to the end": round(time.monotonic() - last, 2),
        "seconds": round(time.monotonic() - begin, 1),
        "exit code": os.waitstatus_to_exitcode(status),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="+")
    result = run(parser.parse_args().command)
    print(json.dumps(result, indent=2))
    sys.exit(int(str(result["exit code"])))
