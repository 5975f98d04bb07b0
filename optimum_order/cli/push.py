"""`optimum-order push`: upload a saved model to the Hub, in one commit."""

from __future__ import annotations

import argparse
from typing import Any

from optimum_order.cli import arguments
from optimum_order.cli.base import Command
from optimum_order.files import size


class PushCommand(Command):
    """Checks the folder, then uploads all of it with a model card, or nothing."""

    name = "push"
    summary = "upload a saved model to the Hub, with a model card"
    description = """\
Upload a saved model to the Hugging Face Hub in one commit, with a model card,
after checking that it is what its manifest says. Log in with 'hf auth login'
or set HF_TOKEN. A LICENSE, NOTICE or README.md in the folder is pushed with
it; a README.md that nobody has edited gives way to a card made anew.
"""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "folder", metavar="FOLDER", help="a folder that 'optimum-order compress' wrote"
        )
        parser.add_argument(
            "repo_id", metavar="ID", help="namespace/name on the Hub; made if there is none"
        )
        arguments.upload(parser)
        parser.add_argument(
            "--revision", metavar="BRANCH", help="commit to this branch, made if there is none"
        )
        parser.add_argument(
            "--message", metavar="TEXT", help="of the commit (default: the order and the format)"
        )

        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="send nothing: check the folder, and say which files would be uploaded",
        )

    def work(self) -> dict[str, Any]:
        from optimum_order.artifact import hub

        args = self.args
        if args.dry_run:
            return {"folder": args.folder, "files": hub.contents(args.folder, args.repo_id)}
        url = hub.push(
            args.folder,
            args.repo_id,
            private=args.private,
            revision=args.revision,
            create_pr=args.create_pr,
            commit_message=args.message,
        )
        return {"folder": args.folder, "url": url}

    def show(self, result: dict[str, Any]) -> None:
        if "files" in result:
            files = result["files"]
            for name, count in files.items():
                print(f"{size(count):>10}  {name}")
            print(
                f"{size(sum(files.values())):>10}  in {len(files)} files would be uploaded to "
                f"{self.args.repo_id}. Nothing was sent."
            )
            return
        print(f"{result['folder']} is at {result['url']}")
