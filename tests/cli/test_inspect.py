"""`optimum-order inspect` shows the manifest and whether it is true."""

import json

from optimum_order.artifact import manifest


def test_json_is_the_manifest_and_the_problems(program, saved, copied):
    done = program("inspect", saved, "--json")
    assert done.code == 0
    assert json.loads(done.out) == manifest.load(saved) | {"problems": []}
    (copied / "extra.py").write_text("not ours")
    done = program("inspect", copied, "--json")
    assert done.code == 1
    assert json.loads(done.out)["problems"] == [
        "extra.py is in the folder and not in the manifest."
    ]
    done = program("inspect", copied, "--json", "--no-verify")
    assert done.code == 0 and json.loads(done.out)["problems"] is None


def test_people_see_whether_it_verifies(program, saved, copied, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def verdict(*arguments):
        return [
            line.split("│")[2].strip()
            for line in program(*arguments).out.splitlines()
            if " verifies " in line
        ]

    assert verdict("inspect", saved) == ["yes"]
    assert verdict("inspect", saved, "--no-verify") == []
    (copied / "extra.py").write_text("not ours")
    assert verdict("inspect", copied) == ["no: extra.py is in the folder and not in the manifest."]
    (copied / "config.json").unlink()
    assert verdict("inspect", copied) == ["no: 2 differences"]
    assert "config.json is missing." in program("inspect", copied).out


def test_a_model_on_the_hub(hub, saved):
    hub.call("push", saved, "me/model", revision="dev")
    done = hub.call("program", "inspect", "me/model", "--revision", "dev", "--no-verify", "--json")
    facts = manifest.load(saved) | {"problems": None}
    assert done["code"] == 0 and json.loads(done["out"]) == facts
    downloads = [request for request in hub.server.requests if "GET" in request]
    assert not any("safetensors" in request or "/lfs/" in request for request in downloads)
    done = hub.call("program", "inspect", "me/model", "--revision", "dev")
    assert done["code"] == 0 and "yes" in done["out"].split("verifies")[1]
    assert hub.call("program", "inspect", "me/nothing")["code"] == 2


def test_people_see_what_was_done(program, saved, tiny_llama_folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    short = program("inspect", saved).out
    text = program("inspect", saved, "--layers").out
    assert "--layers shows them" in short and "left uncorrected" in text
    facts = manifest.load(saved)
    assert f"{len(facts['layers'])} of 4 bits, most error in model.layers." in short
    assert len(short.splitlines()) < 20 < len(text.splitlines())
    assert tiny_llama_folder.name in text and str(tiny_llama_folder) not in text
    assert "wanda:0.5 → gptq:4" in text
    before, after = (facts["metrics"]["perplexity"][when]["value"] for when in ("before", "after"))
    assert f"{before:.4g} → {after:.4g}" in text
    shared = "model.layers."
    assert f" {shared} " in text
    for name, layer in facts["layers"].items():
        name = name.removeprefix(shared)
        (row,) = [line for line in text.splitlines() if f" {name} " in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        errors = ", ".join(f"{stage['relative_error']:.2g}" for stage in layer["stages"])
        rows, columns = layer["shape"]
        assert cells == [
            name,
            f"{rows} x {columns}",
            "4",
            str(layer["group_size"]).replace("-1", "row"),
            "50.0%",
            errors,
        ]


def test_a_folder_without_a_manifest(program, tmp_path):
    done = program("inspect", tmp_path)
    assert done.code == 2 and "optimum_order.json" in done.err and done.err.count("\n") == 1


def rewrite(folder, change):
    file = folder / manifest.FILE
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(json.dumps(facts))


DAMAGE = {
    "no shape": lambda m: next(iter(m["layers"].values())).pop("shape"),
    "a shape of three": lambda m: next(iter(m["layers"].values())).update(shape=[1, 2, 3]),
    "words for numbers": lambda m: m["bytes"].update(before="many"),
    "an empty layer": lambda m: next(iter(m["layers"].values())).update(shape=[0, 0]),
    "notes that are no list": lambda m: next(iter(m["layers"].values())).update(notes=7),
    "no base model": lambda m: m.update(base_model={}),
    "a metric that is a number": lambda m: m["metrics"].update(perplexity=3.5),
}


def test_a_damaged_manifest_is_one_line(program, saved, copied):
    original = (saved / manifest.FILE).read_text()
    for name, change in DAMAGE.items():
        (copied / manifest.FILE).write_text(original)
        rewrite(copied, change)
        done = program("inspect", copied)
        assert done.code == 2 and done.out == "", name
        assert done.err.startswith("optimum-order: error: ") and "damaged" in done.err
        assert done.err.count("\n") == 1


def test_a_manifest_cannot_write_to_the_screen(program, copied):
    rewrite(copied, lambda m: m["base_model"].update(id="\x1b[2Jgone [bold]not markup[/bold]"))
    text = program("inspect", copied).out
    assert "\x1b" not in text and "?[2Jgone [bold]not markup[/bold]" in text
