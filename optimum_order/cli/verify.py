"""`optimum-order verify`: whether a saved model is still, bit for bit, what its manifest says."""

from __future__ import annotations

from typing import Any

from optimum_order.artifact.verify import verify
from optimum_order.cli.base import PATH, Command, printable


class VerifyCommand(Command):
    """Exit code 0 if everything agrees, 1 if anything differs."""

    @staticmethod
    def parse_args(parser):
        parser.description = (
            "Check a saved model against its manifest: the digest of every file, the order wherever it is written, and "
            "that every layer decodes to the values that were measured, with its bits, groups, zeros and N:M pattern. "
            "Exit code 0 if all agrees, 1 if anything differs."
        )
        parser.add_argument("path", metavar="PATH", help=PATH)
        parser.add_argument("--revision", help="of a model on the Hub: branch, tag or commit")

    def work(self) -> dict[str, Any]:
        from optimum_order.artifact import hub

        folder = hub.locate(self.args.path, revision=self.args.revision)
        return {"path": self.args.path, "problems": verify(folder)}

    def show(self, result: dict[str, Any]) -> None:
        for problem in result["problems"]:
            print(printable(problem))
        if not result["problems"]:
            print(f"{result['path']} is what its manifest says.")

    def exit_code(self, result: dict[str, Any]) -> int:
        return 1 if result["problems"] else 0
