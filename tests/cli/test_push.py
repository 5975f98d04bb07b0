"""`optimum-order push` uploads all of a saved model, or says in one line why it did not."""

import json

from optimum_order.artifact import manifest


def test_a_folder_is_pushed_and_its_address_printed(hub, saved):
    done = hub.call("program", "push", str(saved), "me/model", "--private", "--message", "mine")
    (commit,) = hub.server.repositories["me/model"].commits[1:]
    assert done == {
        "code": 0,
        "out": f"{saved} is at {hub.server.url}/me/model/commit/{commit.oid}\n",
    }
    assert hub.server.repositories["me/model"].private and commit.message == "mine"


def test_a_dry_run_lists_the_files_and_sends_nothing(hub, saved, copied):
    (copied / "LICENSE").write_text("mine")
    words = ["push", str(copied), "me/model"]
    done = hub.call("program", *words, "--dry-run", "--json")
    assert done["code"] == 0 and "me/model" not in hub.server.repositories
    sizes = json.loads(done["out"])["files"]
    assert sizes["LICENSE"] == 4
    shown = hub.call("program", *words, "--dry-run")["out"]
    assert all(f"  {name}\n" in shown for name in sizes) and "Nothing was sent." in shown
    assert hub.call("program", *words)["code"] == 0
    pushed = hub.server.files("me/model")
    assert sizes == {name: len(pushed[name]) for name in sizes}
    assert set(pushed) - set(sizes) <= {".gitattributes"}


def test_branch_and_pull_request(hub, saved):
    done = hub.call("program", "push", str(saved), "me/model", "--revision", "dev", "--json")
    assert done["code"] == 0 and json.loads(done["out"])["url"].startswith(
        f"{hub.server.url}/me/model/commit/"
    )
    assert manifest.FILE in hub.server.files("me/model", "dev")
    done = hub.call("program", "push", str(saved), "me/model", "--create-pr", "--json")
    assert json.loads(done["out"]) == {
        "folder": str(saved),
        "url": f"{hub.server.url}/me/model/discussions/1",
    }
    assert manifest.FILE not in hub.server.files("me/model")


def test_a_folder_that_cannot_be_pushed_is_one_line(program, saved, copied, tmp_path):
    for arguments, message in [
        ((saved, "me/a b"), "no id on the Hub"),
        ((tmp_path / "nowhere", "me/model"), "no folder"),
        ((saved, "me/model"), "offline mode is enabled"),
        ((saved, "me/a b", "--dry-run"), "no id on the Hub"),
    ]:
        done = program("push", *arguments)
        assert done.code == 2 and done.out == ""
        *steps, line = done.err.splitlines()
        assert message in line and not any("error" in step for step in steps)
    (copied / "extra.py").write_text("not ours")
    for words in (["--dry-run"], []):
        done = program("push", copied, "me/model", *words)
        assert done.code == 2 and "extra.py is in the folder" in done.err


def test_a_hub_that_refuses_is_exit_code_2(hub, saved):
    for status in (401, 500):
        hub.server.answer_with = status
        before = len(hub.log.read_text())
        done = hub.call("program", "push", str(saved), "me/model")
        assert done == {"code": 2, "out": ""}
        log = hub.log.read_text()[before:]
        assert f"optimum-order: error: The Hub answered {status}" in log
        assert hub.tokens["me"] not in log
