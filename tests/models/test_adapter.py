"""Adapters: merged as PEFT merges them, and trusted as little as any file."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from optimum_order import JointCompressor
from optimum_order.artifact import card
from optimum_order.cli import main
from optimum_order.errors import ModelError, OptimumOrderError
from optimum_order.models.adapter import Adapter

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "tiny-llama",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "megatron_core": "megatron.core",
    "init_lora_weights": True,
}
LAYER = "model.layers.0.self_attn.q_proj"


def written(folder, **changes):
    """A folder with an adapter of one layer of tiny-llama."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": torch.randn(4, 256, generator=generator),
        f"base_model.model.{LAYER}.lora_B.weight": torch.randn(256, 4, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def read(folder):
    return Adapter.read(str(folder), revision=None, token=None)


def opened(folder, **options):
    return JointCompressor.from_pretrained(folder, merge_adapter=True, **options)


# What a file may say


def test_peft_gets_checked_values_only(tmp_path):
    adapter = read(written(tmp_path / "lora", target_modules="(a+)+$", megatron_core="os"))
    assert adapter.options["target_modules"] == [LAYER]
    assert set(adapter.options) == {
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "fan_in_fan_out",
        "lora_bias",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "modules_to_save",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 10**9},
        {"r": 0},
        {"r": "4"},
        {"rank_pattern": {"q_proj": 10**9}},
        {"rank_pattern": {"(a+)+$": 4}},
        {"alpha_pattern": {"q_proj": "8"}},
        {"alpha_pattern": ["q_proj"]},
        {"modules_to_save": [{}]},
        {"modules_to_save": ["../norm"]},
        {"lora_alpha": None},
        {"use_rslora": "yes"},
    ],
)
def test_a_config_of_other_values_is_damaged(tmp_path, changes):
    with pytest.raises(ModelError, match="is damaged, or does not belong"):
        read(written(tmp_path / "lora", **changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("megatron_config", {"tensor_model_parallel_size": 1}),
        ("layer_replication", [[0, 4]]),
        ("bias", "all"),
        ("init_lora_weights", "pissa"),
        ("target_parameters", ["mlp.experts"]),
        ("not_yet_invented", True),
    ],
)
def test_what_is_more_than_a_merge_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ModelError, match=f"has {name}=.*is not merged here"):
        read(written(tmp_path / "lora", **{name: value}))


def test_other_kinds_of_adapter_and_of_file_are_refused(tmp_path):
    with pytest.raises(ModelError, match="of the kind 'IA3', and only LORA is merged"):
        read(written(tmp_path / "lora", peft_type="IA3"))
    folder = written(tmp_path / "lora")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        read(folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match="Cannot read the adapter"):
        read(folder)


def test_a_path_in_a_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    for base in ("/etc", "./local", "../local", "~/local", "a/b/c", "local", "..", ""):
        with pytest.raises(ModelError, match="only an id on the Hub is followed"):
            opened(written(tmp_path / "lora", base_model_name_or_path=base))
    assert read(written(tmp_path / "lora")).named_base() == "tiny-llama"
    adapter = read(written(tmp_path / "lora", base_model_name_or_path="org/model.v1"))
    assert adapter.named_base() == "org/model.v1"


def test_code_of_a_model_that_a_file_names_does_not_run(tmp_path):
    folder = written(tmp_path / "lora", base_model_name_or_path="org/model")
    with pytest.raises(ModelError, match="the code of a model that a file names is not run"):
        opened(folder, trust_remote_code=True)


# Arguments


def test_the_arguments_need_each_other_and_an_adapter(tmp_path, tiny_llama_folder):
    with pytest.raises(ModelError, match=r"holds an adapter .*--merge-adapter"):
        JointCompressor.from_pretrained(written(tmp_path / "lora"))
    with pytest.raises(ModelError, match="give merge_adapter=True"):
        JointCompressor.from_pretrained(tiny_llama_folder, base="tiny-llama")
    with pytest.raises(ModelError, match=r"holds no adapter .* leave out merge_adapter"):
        opened(tiny_llama_folder)


def test_without_peft_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    compressor = opened(written(tmp_path / "lora"))
    with pytest.raises(OptimumOrderError, match=r"pip install 'optimum-order\[adapters\]'"):
        compressor.compress("rtn:4", progress=False)


def test_low_memory_is_refused(tmp_path):
    compressor = opened(written(tmp_path / "lora"))
    with pytest.raises(ModelError, match="merge first"):
        compressor.compress("rtn:4", low_memory=True, work_dir=tmp_path / "work", progress=False)


# With PEFT


def made(folder, **options):
    """Save an adapter of tiny-llama with PEFT, and return what PEFT itself makes of it."""
    peft = pytest.importorskip("peft", reason="needs the extra 'adapters'")
    base = JointCompressor.from_pretrained("tiny-llama").source
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    config = peft.LoraConfig(**(defaults | options))
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base.load(), config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": "tiny-llama"}
    file.write_text(json.dumps(config))
    return peft.PeftModel.from_pretrained(base.load(), folder).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear", "use_dora": True},
        {
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 8},
            "alpha_pattern": {"layers.0.mlp.down_proj": 32},
        },
        {"target_modules": "re_.*|.*v_proj", "modules_to_save": ["norm"]},
    ],
)
def test_the_merged_model_is_that_of_peft(tmp_path, options):
    expected = made(tmp_path / "lora", **options)
    source = opened(tmp_path / "lora").source
    merged = source.load()
    tensors = merged.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    base = JointCompressor.from_pretrained("tiny-llama").source.load().state_dict()
    assert any(not torch.equal(tensors[name], base[name]) for name in base)


def test_the_manifest_names_base_and_adapter(tmp_path):
    made(tmp_path / "lora")
    compressed = opened(tmp_path / "lora").compress("rtn:8", progress=False)
    compressed.save_pretrained(tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "optimum_order.json").read_text())
    base = facts["base_model"]
    assert (base["id"], base["adapter"]["id"]) == ("tiny-llama", "lora")
    assert len(base["adapter"]["digest"]) == 64
    assert not [name for name in facts["layers"] if "lora" in name]
    plain = JointCompressor.from_pretrained("tiny-llama").compress("rtn:8", progress=False)
    assert plain.manifest["base_model"]["digest"] != base["digest"]
    assert "adapter" not in plain.manifest["base_model"]
    assert "compress lora OUTPUT \\\n    --merge-adapter \\\n    --base tiny-llama" in card.command(
        compressed.manifest
    )


def test_the_command_merges(tmp_path, capsys):
    expected = made(tmp_path / "lora")
    out = tmp_path / "out"
    words = ["compress", str(tmp_path / "lora"), str(out), "--merge-adapter"]
    with pytest.raises(SystemExit) as end:
        main([*words, "--order", "magnitude:0.01", "--dry-run", "--json"])
    assert not end.value.code and not out.exists()
    with pytest.raises(SystemExit) as end:
        main([*words, "--order", "magnitude(sparsity=0.01, targets=*.up_proj)"])
    assert not end.value.code
    name = f"{LAYER}.weight"
    from safetensors.torch import load_file

    assert torch.equal(load_file(out / "model.safetensors")[name], expected[name])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["inspect", str(out)])
    assert "merged adapter" in capsys.readouterr().out


def test_an_adapter_of_another_model_is_one_line(tmp_path, tiny_llama_folder):
    made(tmp_path / "lora")
    with pytest.raises(ModelError, match=r"does not fit the base model .*--base"):
        opened(tmp_path / "lora", base=tiny_llama_folder).source.load()


def test_an_adapter_of_tied_layers_is_refused(tmp_path):
    made(tmp_path / "lora", modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"'lm_head', which is tied to 'model\.embed_tokens'"):
        opened(tmp_path / "lora").source.load()


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    pytest.importorskip("peft", reason="needs the extra 'adapters'")
    with pytest.raises(ModelError, match="no numbers"):
        opened(written(tmp_path / "lora", lora_alpha=3e38)).source.load()
