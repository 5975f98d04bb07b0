"""`optimum-order verify`: compare a saved model with its manifest, bit by bit."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command, printable


class VerifyCommand(Command):
    """Exits with 0 if everything agrees, with 1 if anything differs."""

    name = "verify"
    summary = "check that a saved model is what its manifest says"
    description = """\
Check a saved model against its manifest: the digest of every file, the order
wherever it is written, and that every layer decodes to the values that were
measured, with its bits, groups, zeros and N:M pattern. Exit code 0 if all
agrees, 1 if anything differs.
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        arguments.saved_model(parser)

    def work(self) -> dict[str, Any]:
        from optimum_order.artifact import hub, manifest
        from optimum_order.artifact.verify import verify

        folder = hub.locate(self.args.path, revision=self.args.revision)
        problems = verify(folder, progress=True)
        code = not problems and bool(manifest.load(folder)["base_model"].get("remote_code"))
        return {"path": self.args.path, "problems": problems, "remote_code": code}

    def show(self, result: dict[str, Any]) -> None:
        for problem in result["problems"]:
            print(printable(problem))
        if not result["problems"]:
            print(printable(f"{result['path']} is what its manifest says."))
        if result["remote_code"]:
            print("The model needs code of its own, which nothing here runs.")

    def exit_code(self, result: dict[str, Any]) -> int:
        return 1 if result["problems"] else 0
