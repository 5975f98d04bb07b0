"""Where transformers stores what: the map from parameters to tensors of a checkpoint."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from optimum_order.formats.layout import Layout, Piece, blocks
from optimum_order.models.units import find_units

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
}
EXPERTS = {
    "moe_intermediate_size": 8,
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
GROUPED = TINY | EXPERTS | {"num_key_value_heads": 2, "intermediate_size": 8}
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1}
CONFIGS = {
    "llama": TINY | {"intermediate_size": 24},
    "gpt2": GPT2 | {"eos_token_id": 1},
    "mixtral": GROUPED,
    "qwen2_moe": TINY | EXPERTS | {"intermediate_size": 24},
    "gpt_oss": GROUPED,
    "granitemoe": GROUPED,
    "bert": TINY | {"intermediate_size": 24},
}


def build(name):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(config)


def targets_of(model):
    return {target.name: target for unit in find_units(model) for target in unit.targets}


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_are_where_save_pretrained_put_them(name, tmp_path):
    model = build(name)
    layout = Layout.of(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    targets = targets_of(model).values()
    assert len(targets) > 4
    for target in targets:
        rows = []
        for piece in layout.pieces(target):
            stored = saved[piece.key]
            assert piece.whole == (stored.shape == (piece.rows, stored.shape[-1]))
            rows.append(stored.reshape(-1, stored.shape[-1])[piece.at : piece.at + piece.rows])
        matrix = torch.cat(rows)
        assert torch.equal(matrix.T if target.transposed else matrix, target.read())
    assert layout.converted <= saved.keys()


@pytest.mark.parametrize("architecture", ["resnet", "regnet", "vit", "deit", "convnext"])
def test_filters_of_a_convolution_are_rows(make_image_model, architecture, tmp_path):
    model = make_image_model(architecture)
    layout = Layout.of(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for target in targets_of(model).values():
        (piece,) = layout.pieces(target)
        stored = saved[piece.key]
        assert torch.equal(stored.flatten(1)[piece.at : piece.at + piece.rows], target.read())
        assert piece.start == 0 and piece.whole == (stored.ndim == 2)
    assert layout.converted == set()


def test_only_tensors_that_are_taken_apart_are_converted():
    for name in ("llama", "gpt2", "gpt_oss", "granitemoe", "bert"):
        assert not Layout.of(build(name)).converted, name
    experts = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{weight}.weight"
        for layer in range(2)
        for expert in range(3)
        for weight in ("w1", "w2", "w3")
    ]
    assert Layout.of(build("mixtral")).converted == set(experts)


def test_an_expert_is_stored_in_parts():
    model = build("mixtral")
    stored = "model.layers.1.block_sparse_moe.experts.2"
    expert = targets_of(model)["model.layers.1.mlp.experts.gate_up_proj.2"]
    assert Layout.of(model).pieces(expert) == (
        Piece(f"{stored}.w1.weight", at=0, start=0, rows=8, whole=True),
        Piece(f"{stored}.w3.weight", at=0, start=8, rows=8, whole=True),
    )


def test_a_model_loaded_from_disk_has_the_same_layout(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert Layout.of(loaded)._pieces == Layout.of(model)._pieces


def test_an_empty_model_has_the_same_layout():
    model = build("mixtral")
    assert Layout.of(build("mixtral").to("meta"))._pieces == Layout.of(model)._pieces


def test_blocks_are_told_by_the_first_number_in_a_name():
    names = [
        "a.weight",
        "m.layers.0.x.1.w",
        "m.layers.0.y",
        "m.layers.10.x",
        "m.layers.1.x",
        "head.3",
    ]
    assert blocks(names) == [
        ["a.weight"],
        ["m.layers.0.x.1.w", "m.layers.0.y"],
        ["m.layers.10.x"],
        ["m.layers.1.x"],
        ["head.3"],
    ]
    assert [name for block in blocks(names) for name in block] == names
