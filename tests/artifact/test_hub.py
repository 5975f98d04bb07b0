"""An artifact goes to the Hub whole or not at all, and comes back as measured; no token leaks."""

import itertools
import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_order import JointCompressor, formats
from optimum_order.artifact import hub, manifest
from optimum_order.errors import ArtifactError, HubError
from optimum_order.files import sha256

PAGES = {"README.md", manifest.PLOT}
SECRET = "hf_NobodyMayEverSeeThis0123456789"
# create, info, validate-yaml, preupload, batch; of the weights and the picture each upload and verify; commit
REQUESTS = 10


@pytest.fixture(scope="module")
def compressor(tiny_llama_folder, text_file):
    return JointCompressor.from_pretrained(
        tiny_llama_folder, calibration=str(text_file), calibration_samples=4, sequence_length=64
    )


@pytest.fixture(scope="module")
def saved(compressor, text_file, tmp_path_factory):
    """A measured artifact. Do not write into it."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    compressed = compressor.compress("wanda:0.5 > gptq:4", progress=False)
    compressor.evaluate(str(text_file), progress=False)
    compressed.evaluate(str(text_file), progress=False)
    compressed.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other(compressor, tmp_path_factory):
    """Another artifact of the same model, in another format."""
    folder = tmp_path_factory.mktemp("hub") / "other"
    compressor.compress("magnitude:0.5", progress=False).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


FRESH = """
import sys
from transformers import pipeline
generate = pipeline("text-generation", model="me/model", device="cpu")
print(generate("The import", max_new_tokens=8, do_sample=False)[0]["generated_text"])
assert not any(name.startswith("optimum_order") for name in sys.modules)
from optimum_order.cli import main
for command in (["verify", "me/model"], ["inspect", "me/model"]):
    try:
        main(command)
    except SystemExit as end:
        assert end.code == 0, end.code
"""


@pytest.mark.slow
def test_what_is_pushed_is_pulled_verified_run_and_shown_in_a_fresh_process(hub, saved, tmp_path):
    url = hub.call("push", saved, "me/model")
    (made,) = hub.server.repositories["me/model"].commits[1:]
    assert url == f"{hub.server.url}/me/model/commit/{made.oid}"
    remote = hub.server.files("me/model")
    local = {file.name: file.read_bytes() for file in saved.iterdir()}
    own = local.pop("README.md").decode()  # of a folder
    assert 'model="model"' in own and b'model="me/model"' in remote["README.md"]
    assert {name: remote[name] for name in local} == local
    assert set(remote) == set(local) | PAGES | {".gitattributes"}
    assert "/me/model/resolve" not in str(hub.server.requests)

    text = hub.fresh(FRESH, tmp_path, COLUMNS="200")
    tokenizer = AutoTokenizer.from_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved)
    ids = tokenizer("The import", return_tensors="pt").input_ids
    expected = tokenizer.decode(
        model.generate(ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True
    )
    assert text.startswith(expected + "\n")
    assert "me/model is what its manifest says." in text
    assert "wanda:0.5 → gptq:4" in text and "yes" in text.split("verifies")[1]


@pytest.mark.slow
def test_a_push_that_is_cut_off_commits_nothing_and_the_next_completes_it(hub, saved):
    for at in range(REQUESTS):
        name = f"me/cut{at}"
        hub.server.clear()  # or what was uploaded once would not be uploaded again
        hub.server.drop_from = at
        failed = hub.fail("push", saved, name)
        assert failed["error"] == "HubError" and "ry again" in failed["message"]
        repository = hub.server.repositories.get(name)
        messages = [] if repository is None else [c.message for c in repository.commits]
        assert messages in ([], ["initial commit"])
        hub.server.recover()
        hub.call("push", saved, name)
        messages = [commit.message for commit in hub.server.repositories[name].commits]
        assert messages == ["initial commit", "wanda:0.5 > gptq:4 (compressed-tensors)"]
        assert hub.call("verify", hub.call("pull", name)) == []


def test_how_many_requests_there_are_to_cut(hub, saved):
    hub.call("push", saved, "me/whole")
    assert len(hub.server.requests) == REQUESTS, hub.server.requests
    assert hub.server.requests[-1] == "POST /api/models/me/whole/commit/main"


def test_pushing_again_sends_and_commits_only_what_changed(hub, saved):
    hub.call("push", saved, "me/model")
    hub.server.recover()
    hub.call("push", saved, "me/model", commit_message="again")
    assert not [
        request
        for request in hub.server.requests
        if request.startswith("PUT") or "/commit/" in request
    ]
    assert len(hub.server.repositories["me/model"].commits) == 2


def test_a_pull_request_leaves_the_branch_alone(hub, saved, other):
    hub.call("push", saved, "me/model")
    guest = hub.tokens["guest"]
    refused = hub.fail("push", other, "me/model", token=guest)
    assert (
        refused["error"] == "HubError"
        and "403" in refused["message"]
        and "--create-pr" in refused["message"]
    )
    before = hub.server.repositories["me/model"].branches["main"]
    url = hub.call(
        "push", other, "me/model", token=guest, create_pr=True, commit_message="prune only"
    )
    assert url == f"{hub.server.url}/me/model/discussions/1"
    assert hub.server.repositories["me/model"].branches["main"] is before
    assert hub.server.repositories["me/model"].branches["refs/pr/1"].message == "prune only"
    assert (
        json.loads(hub.server.files("me/model", "refs/pr/1")[manifest.FILE])["order"]
        == "magnitude:0.5"
    )
    assert hub.call("verify", hub.call("pull", "me/model", revision="refs/pr/1")) == []


def test_a_branch_is_made_and_its_card_says_so(hub, saved):
    hub.call("push", saved, "me/model", revision="dev")
    assert set(hub.server.files("me/model")) == {".gitattributes"}
    assert b'model="me/model", revision="dev"' in hub.server.files("me/model", "dev")["README.md"]
    assert hub.call("verify", hub.call("pull", "me/model", revision="dev")) == []
    assert "no optimum_order.json" in hub.fail("pull", "me/model")["message"]
    hub.call("push", saved, "me/model", revision="dev", commit_message="a branch that is there")


def test_private_is_private(hub, saved):
    hub.call("push", saved, "me/hidden", private=True)
    assert hub.server.repositories["me/hidden"].private
    refused = hub.fail("pull", "me/hidden", token=hub.tokens["guest"])
    assert refused["error"] == "HubError" and "404" in refused["message"]
    hub.call("push", saved, "me/shown")
    assert not hub.server.repositories["me/shown"].private
    hub.server.recover()
    refused = hub.fail("push", saved, "me/shown", private=True, commit_message="hide it")
    assert "is there already, and public" in refused["message"]
    assert len(hub.server.repositories["me/shown"].commits) == 2


def test_what_does_not_verify_is_not_sent(hub, copy):
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused = hub.fail("push", copy, "me/model")
    assert refused["error"] == "ArtifactError" and "its sha256 does not match" in refused["message"]
    assert hub.server.requests == []


def test_nothing_outside_the_folder_is_sent(hub, copy, tmp_path):
    secret = tmp_path / "token"
    secret.write_text("hf_secretsecret")
    for name in ("README.md", "LICENSE", "NOTICE", "optimum_order.png", "config.json"):
        before = (copy / name).read_bytes() if (copy / name).exists() else None
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(secret)
        refused = hub.fail("push", copy, "me/model")
        assert refused["error"] == "ArtifactError" and f"{name} is a link" in refused["message"]
        (copy / name).unlink()
        if before is not None:
            (copy / name).write_bytes(before)
    assert hub.server.requests == []


def test_an_artifact_of_a_version_that_said_less_is_told_so_before_anything_is_sent(hub, copy):
    facts = manifest.load(copy)
    manifest.write({key: value for key, value in facts.items() if key != "sequence_length"}, copy)
    refused = hub.fail("push", copy, "me/model")
    assert refused["error"] == "ArtifactError" and "lacks 'sequence_length'" in refused["message"]
    assert "older optimum-order: compress the model again" in refused["message"]
    assert hub.server.requests == []


def test_only_files_of_an_artifact_are_sent(hub, copy):
    (copy / ".env").write_text("secret")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("secret")
    (copy / "LICENSE").write_text("mine")
    hub.call("push", copy, "me/model")
    remote = hub.server.files("me/model")
    assert ".env" not in remote and ".git/config" not in remote and remote["LICENSE"] == b"mine"
    facts = manifest.load(copy)
    (copy / "modeling.py").write_text("print('hello')")
    stated = {
        "sha256": sha256(copy / "modeling.py"),
        "bytes": (copy / "modeling.py").stat().st_size,
    }
    manifest.write(facts | {"files": facts["files"] | {"modeling.py": stated}}, copy)
    hub.server.recover()
    refused = hub.fail("push", copy, "me/code")
    assert refused["error"] == "ArtifactError" and "'modeling.py'" in refused["message"]
    assert hub.server.requests == []


def test_files_of_an_earlier_model_go_and_those_of_people_stay(hub, saved, other):
    hub.call("push", saved, "me/model")
    repository = hub.server.repositories["me/model"]
    card = ModelCard(hub.server.files("me/model")["README.md"].decode())
    card.data["license"] = "mit"
    stays = {
        "LICENSE.txt": b"mine",
        "notes.md": b"mine",
        "picture.jpg": b"mine",
        "README.md": str(card).encode(),
    }
    goes = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "merges.txt": b"old",
    }
    repository.commit("main", "by hand", repository.branches["main"].files | stays | goes)
    hub.call("push", other, "me/model")
    remote = hub.server.files("me/model")
    assert {name: remote[name] for name in stays if name != "README.md"} == {
        name: content for name, content in stays.items() if name != "README.md"
    }
    assert not set(goes) & set(remote)
    data = ModelCard(remote["README.md"].decode()).data
    assert data["license"] == "mit" and "magnitude" in data["tags"] and data.eval_results is None
    assert hub.call("verify", hub.call("pull", "me/model")) == []


def test_a_card_of_ones_own_is_pushed_and_verify_leaves_it_alone(hub, copy):
    (copy / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    hub.call("push", copy, "me/model")
    assert hub.server.files("me/model")["README.md"] == (copy / "README.md").read_bytes()
    assert hub.call("verify", hub.call("pull", "me/model")) == [] == hub.call("verify", copy)


def test_a_gitignore_that_could_hide_a_file_is_refused(hub, saved):
    hub.call("push", saved, "me/model")
    repository = hub.server.repositories["me/model"]
    repository.commit(
        "main", "ignore", repository.branches["main"].files | {".gitignore": b"*.json"}
    )
    assert ".gitignore" in hub.fail("push", saved, "me/model", commit_message="more")["message"]
    assert len(repository.commits) == 3


def test_a_card_on_the_hub_that_cannot_be_read_is_not_thrown_away(hub, saved):
    hub.call("push", saved, "me/model")
    repository = hub.server.repositories["me/model"]
    repository.commit(
        "main", "typo", repository.branches["main"].files | {"README.md": b"---\na: [b\n---\n"}
    )
    refused = hub.fail("push", saved, "me/model")
    assert (
        refused["error"] == "HubError"
        and "README.md that is on the Hub cannot be read" in refused["message"]
    )
    assert len(repository.commits) == 3


def test_a_commit_of_somebody_else_meanwhile_is_not_written_over(hub, saved):
    hub.call("push", saved, "me/model", commit_message="first")
    repository = hub.server.repositories["me/model"]

    def interfere(request):
        if "preupload" in request:
            repository.commit(
                "main", "meanwhile", repository.branches["main"].files | {"notes.md": b"theirs"}
            )

    hub.server.before = interfere
    repository.commit("main", "edit", repository.branches["main"].files | {"config.json": b"{}"})
    refused = hub.fail("push", saved, "me/model")
    assert refused["error"] == "HubError" and "committed there meanwhile" in refused["message"]
    assert repository.commits[-1].message == "meanwhile"


def test_code_and_pickles_are_left_on_the_hub_and_other_weights_are_seen(hub, saved):
    hub.call("push", saved, "me/model")
    repository = hub.server.repositories["me/model"]
    bad = {
        "modeling.py": b"raise SystemExit",
        "pytorch_model.bin": b"pickle",
        "adapter_config.json": b"{}",
    }
    repository.commit("main", "bad", repository.branches["main"].files | bad)
    folder = hub.call("pull", "me/model")
    assert hub.call("verify", folder) == [
        "adapter_config.json is in the folder and not in the manifest."
    ]
    assert not any(
        "modeling.py" in r or "pytorch_model" in r for r in hub.server.requests if "resolve" in r
    )


def test_a_weight_that_was_changed_on_the_hub_is_seen(hub, saved):
    hub.call("push", saved, "me/model")
    files = hub.server.repositories["me/model"].branches["main"].files
    oid = files["model.safetensors"]
    data = bytearray(hub.server.blobs[oid])
    data[-1] ^= 1
    files["model.safetensors"] = bytes(data)
    assert hub.call("verify", hub.call("pull", "me/model")) == [
        "model.safetensors was changed after it was written: its sha256 does not match."
    ]


def test_a_model_that_is_no_artifact_is_not_downloaded(hub, saved):
    hub.call("push", saved, "me/model")
    repository = hub.server.repositories["me/model"]
    files = dict(repository.branches["main"].files)
    del files[manifest.FILE]
    repository.commit("main", "not ours", files)
    hub.server.recover()
    assert "it is not a model that optimum-order wrote" in hub.fail("pull", "me/model")["message"]
    assert not any("resolve" in request for request in hub.server.requests)


PATHS = [
    "",
    ".",
    "..",
    "../evil.json",
    "/tmp/evil.json",
    "a/../../evil.json",
    "..\\evil.json",
    "a\0b",
    "n" * 300,
]
LEAVES = [None, True, -1, 0, 2**40, 2**70, 0.5, [], {}, [None], {"a": [{}]}, *PATHS]
HEADERS = ["ETag", "X-Linked-ETag", "X-Linked-Size", "X-Repo-Commit", "Location", "X-Error-Code"]
VALUES = [
    *PATHS,
    "http://[",
    "file:///etc/passwd",
    "http://127.0.0.1:1/x",
    "-5",
    "é",
    "%2e%2e%2fevil.json",
]
STATUSES = [204, 206, 301, 302, 400, 403, 404, 416, 429, 500]
PULLED = itertools.count()


def replaced(value, random):
    """A JSON value with one place in it replaced."""
    if isinstance(value, (dict, list)) and value and random.randrange(5):
        key = random.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        changed = dict(value) if isinstance(value, dict) else list(value)
        changed[key] = replaced(value[key], random)
        return changed
    return random.choice(LEAVES)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    at=st.integers(0, 12),
    what=st.sampled_from(
        ["json", "json", "bytes", "half", "status", "header", "header", "no header"]
    ),
    seed=st.integers(0, 2**32),
)
def test_whatever_a_server_answers_a_pull_ends_well_or_in_our_error_and_inside_the_cache(
    hub, saved, at, what, seed
):
    number = next(PULLED)
    files = {f.name: f.read_bytes() for f in saved.iterdir() if f.name != "README.md"}
    hub.server.hold(f"me/pulled{number}", files)
    answered = itertools.count()

    random = Random(seed)  # not hypothesis' own, which draws in one thread only

    def tamper(request, status, content, headers):
        if next(answered) != at:
            return status, content, headers
        if what == "json" and request.startswith("GET /api/"):
            return status, json.dumps(replaced(json.loads(content), random)).encode(), headers
        if what in ("json", "bytes"):
            return status, random.randbytes(random.randrange(99)), headers
        if what == "half":
            return status, None, headers
        if what == "status":
            return random.choice(STATUSES), content, headers
        name = random.choice(HEADERS)
        rest = {key: value for key, value in headers.items() if key != name}
        return status, content, rest | ({name: random.choice(VALUES)} if what == "header" else {})

    hub.server.tamper = tamper
    around = sorted(hub.home.parent.iterdir()), sorted(Path("/tmp").glob("evil*"))
    answer = hub.ask("pull", f"me/pulled{number}")
    hub.server.recover()
    assert (sorted(hub.home.parent.iterdir()), sorted(Path("/tmp").glob("evil*"))) == around
    if "error" in answer:
        assert answer["error"] in ("HubError", "ArtifactError"), answer["traceback"]
        return
    folder = Path(answer["result"])
    assert folder.resolve().is_relative_to(hub.home.resolve())
    if not hub.call("verify", folder):
        assert {name: (folder / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("call", ["push", "pull", "compress", "check"])
def test_no_error_or_log_tells_a_token(hub, saved, call):
    arguments = {
        "push": (saved, "me/x"),
        "pull": ("me/x",),
        "compress": ("me/x", "rtn:4"),
        "check": ("me/x",),
    }[call]
    for status, advice in [
        (401, "hf auth login"),
        (403, "may write there"),
        (404, "Check the id"),
        (500, "ry again"),
    ]:
        hub.server.recover()
        hub.server.answer_with = status
        failed = hub.fail(call, *arguments, token=SECRET)
        assert failed["error"] == ("ModelError" if call == "compress" else "HubError")
        if call != "compress":
            assert str(status) in failed["message"] and advice in failed["message"]
        assert "\n" not in failed["message"]
        output = failed["message"] + failed["traceback"] + hub.log.read_text()
        assert hub.server.requests and SECRET not in output and SECRET[3:] not in output


def test_a_token_is_in_nothing_that_is_pushed(hub, saved):
    hub.call("push", saved, "me/model", token=hub.tokens["me"])
    everything = b"".join(hub.server.files("me/model").values())
    assert not any(token.encode() in everything for token in hub.tokens.values())
    assert hub.tokens["me"] not in hub.log.read_text()


def test_a_model_on_the_hub_is_compressed_and_pushed(hub, tiny_llama_folder):
    base = {file.name: file.read_bytes() for file in tiny_llama_folder.iterdir()}
    hub.call("push_files", "me/base", base={name: str(tiny_llama_folder / name) for name in base})
    commit = hub.server.repositories["me/base"].branches["main"].oid
    made = hub.call(
        "compress",
        "me/base",
        "rtn:4",
        push_to="me/small",
        options={"commit_message": "small"},
        revision="main",
    )
    assert made["url"].startswith(f"{hub.server.url}/me/small/commit/")
    assert hub.server.repositories["me/small"].commits[-1].message == "small"
    stated = json.loads(hub.server.files("me/small")[manifest.FILE])
    assert stated["base_model"]["id"] == "me/base" and stated["base_model"]["revision"] == commit
    assert stated["bytes"]["before"] == len(base["model.safetensors"])
    assert stated == {key: made["manifest"][key] for key in stated if key != "digest"} | {
        "digest": stated["digest"]
    }
    data = ModelCard(hub.server.files("me/small")["README.md"].decode()).data
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "quantized")
    again = hub.call("compress", "me/small", "magnitude:0.5", push_to="me/smaller")["manifest"]
    assert again["base_model"]["id"] == "me/small"
    assert again["continues"]["digest"] == stated["digest"]
    assert again["continues"]["base_model"]["id"] == "me/base"


def test_names_that_are_neither_folder_nor_id_are_refused(saved, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # beside which there is no folder "a"
    assert hub.locate(saved) == saved
    for name in (tmp_path / "nowhere", "nowhere", "./a/b", "a/b/c", "../a"):
        with pytest.raises(ArtifactError, match="no folder"):
            hub.locate(name)
    with pytest.raises(ArtifactError, match="is a folder"):
        hub.locate(saved, revision="main")
    for name in ("me/a--b", "a/b/c", "spaces here"):
        with pytest.raises(HubError, match="is no id on the Hub"):
            hub.push(saved, name)


def test_without_a_network_it_says_so(saved):
    with pytest.raises(HubError, match=r"could not be asked.*ry again"):
        hub.locate("me/model")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        hub.push(saved, "me/model")


ORDERS = {
    "bitsandbytes": "bitsandbytes:nf4",
    "coded": "ecsq:4",
    "compressed-tensors": "wanda:0.5 > gptq:4",
    "dense": "wanda:0.5 > rtn(bits=4, symmetric=false)",
    "gguf": "wanda:0.5 > gptq(bits=4, group_size=32)",
    "gptq": "gptq:4",
    "sparse": "wanda:0.7 > gptq:4",
}
NEEDS = {
    "gptq": "gptqmodel"
}  # which cannot be installed beside the torch that the rest is tested with


@pytest.mark.parametrize("format", sorted(formats.available()))
@pytest.mark.slow
def test_the_code_in_the_card_runs_in_a_fresh_process(
    hub, compressor, tiny_llama_folder, tmp_path, format
):
    if format == "gptq":  # holds no float32 scales
        ids = torch.arange(64).view(1, 64)
        compressor = JointCompressor.from_pretrained(
            tiny_llama_folder, calibration=ids, sequence_length=64, dtype="float16"
        )
    compressor.compress(ORDERS[format], format=format, progress=False).save_pretrained(
        tmp_path / "out", format=format
    )
    hub.call("push", tmp_path / "out", "me/model")
    card = hub.server.files("me/model")["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0]
    assert all(package in card for package in formats.available()[format].packages)
    if format in NEEDS:
        pytest.importorskip(NEEDS[format])
    (tmp_path / "home").mkdir()
    out = hub.fresh("import torch; torch.manual_seed(0)\n" + code, tmp_path / "home")
    assert out.startswith("The quick brown fox") and len(out) > len("The quick brown fox\n")
