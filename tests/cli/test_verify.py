"""`optimum-order verify` names every difference between a saved model and its manifest."""

import json

from optimum_order.artifact import manifest


def test_an_untouched_folder_is_good(program, saved):
    done = program("verify", saved)
    assert done.code == 0 and "error" not in done.err
    assert str(saved) in done.out
    assert program("verify", saved, "--quiet").err == ""


def test_a_changed_byte_is_named(program, copied):
    file = copied / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = program("verify", copied)
    assert done.code == 1 and "model.safetensors" in done.out and "sha256" in done.out


def test_every_difference_has_its_own_line(program, copied):
    (copied / "config.json").unlink()
    (copied / "extra.txt").write_text("not ours")
    done = program("verify", copied)
    assert done.code == 1
    assert any("config.json is missing" in line for line in done.out.splitlines())
    assert any(line.startswith("extra.txt") for line in done.out.splitlines())


def test_a_folder_without_a_manifest_is_not_an_artifact(program, tmp_path):
    done = program("verify", tmp_path)
    assert done.code == 1 and "optimum_order.json" in done.out
    missing = program("verify", tmp_path / "nowhere")
    assert missing.code == 2 and missing.out == "" and "no folder" in missing.err


def test_an_edited_manifest_is_a_difference(program, copied):
    file = copied / manifest.FILE
    facts = json.loads(file.read_text())
    facts["order"] = "gptq:4 > wanda:0.5"
    file.write_text(json.dumps(facts))
    done = program("verify", copied)
    assert done.code == 1 and manifest.FILE in done.out


def test_a_model_on_the_hub(hub, saved):
    hub.call("push", saved, "me/model")
    done = hub.call("program", "verify", "me/model")
    assert done == {"code": 0, "out": "me/model is what its manifest says.\n"}
    repository = hub.server.repositories["me/model"]
    good = repository.branches["main"]
    repository.commit("main", "edit", good.files | {"generation_config.json": b"{}"})
    done = hub.call("program", "verify", "me/model")
    assert done["code"] == 1 and "generation_config.json" in done["out"]
    assert hub.call("program", "verify", "me/model", "--revision", good.oid)["code"] == 0
