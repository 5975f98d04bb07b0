"""Does what it is told in a process whose Hub is a server on this machine: one JSON object a line in, one out.

The client of the Hub reads its address and whether it may be asked when it is imported, so the tests themselves, which
have to stay off the network, cannot talk to it.
"""

import contextlib
import io
import json
import os
import sys
import time
import traceback


def push(folder, repo_id, **options):
    from optimum_order.artifact import hub

    return hub.push(folder, repo_id, **options)


def pull(repo_id, **options):
    from optimum_order.artifact import hub

    return str(hub.pull(repo_id, **options))


def push_files(repo_id, base):
    """Upload files by the client's own means: a model that is not ours."""
    from huggingface_hub import CommitOperationAdd, HfApi

    HfApi().create_repo(repo_id)
    operations = [CommitOperationAdd(name, path) for name, path in base.items()]
    HfApi().create_commit(repo_id, operations, commit_message="a model")


def check(repo_id, **options):
    from optimum_order.artifact import hub

    return hub.check(repo_id, **options)


def verify(folder):
    from optimum_order.artifact import verify as module

    return module.verify(folder)


def compress(model, order, out=None, *, push_to=None, options=None, **settings):
    """Compress and save, or push; the manifest, and where it was pushed."""
    from optimum_order import JointCompressor

    compressed = JointCompressor.from_pretrained(model, **settings).compress(order, progress=False)
    url = (
        compressed.push_to_hub(push_to, **(options or {}))
        if push_to
        else compressed.save_pretrained(out)
    )
    return {"manifest": compressed.manifest, "url": url}


def program(*arguments):
    """Run `optimum-order`: its exit code and stdout."""
    from optimum_order.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(list(arguments))
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return {"code": code, "out": out.getvalue()}


def serve():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints by mistake goes where logs go
    time.sleep = lambda seconds: (
        None
    )  # the client waits before it tries again; the server will not change its mind
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            result = {"result": globals()[asked["call"]](*asked["arguments"], **asked["options"])}
        except Exception as error:
            result = {
                "error": type(error).__name__,
                "message": str(error),
                "traceback": traceback.format_exc(),
            }
        sys.stderr.flush()
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    serve()
