"""Files beside a model go with it, and nothing from elsewhere does."""

import json
import shutil
from types import SimpleNamespace

import pytest

from optimum_order import JointCompressor
from optimum_order.artifact import manifest
from optimum_order.artifact.convert import convert
from optimum_order.artifact.verify import verify
from optimum_order.models.documents import card_facts, documents

HUB = {"revision": None, "token": None, "trust_remote_code": False}
CODE = SimpleNamespace(auto_map={"AutoModel": "own.Model", "AutoConfig": "other/repo--far.Config"})


@pytest.fixture
def folder(tiny_llama_folder, tmp_path):
    """A model as sentence-transformers saves one, with a license and code."""
    folder = shutil.copytree(tiny_llama_folder, tmp_path / "model")
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "../elsewhere", "a/b")]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128}')
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    (folder / "LICENSE").write_text("yours")
    (folder / "own.py").write_text("raise SystemExit")
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("the card of the original")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("secret")
    return folder


def test_modules_and_the_license_belong_to_a_model(folder):
    expected = {
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(documents(str(folder), HUB, CODE)) == expected
    trusted = documents(str(folder), HUB | {"trust_remote_code": True}, CODE)
    assert set(trusted) == expected | {"own.py"}


def test_a_link_out_of_the_folder_is_left_out(folder, tmp_path):
    (folder / "NOTICE").symlink_to(tmp_path / "elsewhere" / "config.json")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(folder / "notes.txt")
    names = set(documents(str(folder), HUB, CODE))
    assert "NOTICE" not in names and "LICENSE" in names


def test_a_pickled_module_is_named(folder, caplog):
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    assert "2_Dense/pytorch_model.bin" not in documents(str(folder), HUB, CODE)
    assert "'2_Dense/pytorch_model.bin' is pickled" in caplog.text


def test_they_are_saved_sealed_and_converted(folder, tmp_path):
    saved = tmp_path / "saved"
    compressor = JointCompressor.from_pretrained(folder)
    compressor.compress("rtn:8", progress=False).save_pretrained(saved, format="compressed-tensors")
    convert(saved, tmp_path / "converted", "dense")
    for result in (saved, tmp_path / "converted"):
        assert verify(result) == []
        for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
            assert (result / name).read_bytes() == (folder / name).read_bytes()
            assert name in manifest.load(result)["files"]
        assert (result / "LICENSE").read_text() == "yours"
        assert "the card of the original" not in (result / "README.md").read_text()
        assert not (result / "own.py").exists()
    (saved / "1_Pooling" / "config.json").write_text("{ }")
    assert "1_Pooling/config.json" in verify(saved)[0]


CARDS = {
    "license: apache-2.0\nlanguage:\n- en\n- de": {
        "license": "apache-2.0",
        "language": ["en", "de"],
    },
    "license: other\nlicense_name: llama3.2\nlanguage: en": {
        "license": "other",
        "license_name": "llama3.2",
        "language": ["en"],
    },
    "license: [mit]\nlanguage: {en: 1}": {},
    "license: 'x\\n# title'\nlanguage: ['[a](b)']": {},
    "license: mit\nlanguage: [en, 5]": {"license": "mit"},
    "license: &a [*a": {},
}


def test_a_card_tells_license_and_languages_and_no_more(folder):
    for head, facts in CARDS.items():
        (folder / "README.md").write_text(f"---\n{head}\n---\n# A card\n")
        assert card_facts(str(folder), HUB) == facts, head
    (folder / "README.md").write_text("no head")
    assert card_facts(str(folder), HUB) == {}
    (folder / "README.md").unlink()
    assert card_facts(str(folder), HUB) == {}
