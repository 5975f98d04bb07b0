"""Where transformers stores what: the map from parameters to tensors of a checkpoint."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from optimum_order import backends
from optimum_order.formats.base import Layout, Paired, Piece, blocks, outline
from optimum_order.layers.state import LayerState
from optimum_order.models.units import find_units
from optimum_order.order import Order

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
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**TINY, intermediate_size=24),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **TINY, **EXPERTS, num_key_value_heads=2, intermediate_size=8
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**TINY, **EXPERTS, intermediate_size=24),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **TINY, **EXPERTS, num_key_value_heads=2, intermediate_size=8
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **TINY, **EXPERTS, num_key_value_heads=2, intermediate_size=8
    ),
    "bert": lambda: transformers.BertConfig(**TINY, intermediate_size=24),
}


def build(name):
    torch.manual_seed(0)
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(CONFIGS[name]())


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_are_where_save_pretrained_put_them(name, tmp_path):
    model = build(name)
    layout = Layout.of(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    targets = [target for unit in find_units(model) for target in unit.targets]
    assert len(targets) > 4
    for target in targets:
        rows = []
        for piece in layout.pieces(target.name, target):
            stored = saved[piece.key]
            assert piece.whole == (stored.shape == (piece.rows, stored.shape[-1]))
            rows.append(stored.reshape(-1, stored.shape[-1])[piece.at : piece.at + piece.rows])
        matrix = torch.cat(rows)
        assert torch.equal(matrix.T if target.transposed else matrix, target.read())
    assert layout.converted <= saved.keys()


@pytest.mark.parametrize("architecture", ["resnet", "regnet", "vit", "deit", "convnext"])
def test_the_filters_of_a_convolution_are_rows(make_image_model, architecture, tmp_path):
    model = make_image_model(architecture)
    layout = Layout.of(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    targets = [target for unit in find_units(model) for target in unit.targets]
    for target in targets:
        (piece,) = layout.pieces(target.name, target)
        stored = saved[piece.key]
        assert torch.equal(stored.flatten(1)[piece.at : piece.at + piece.rows], target.read())
        assert piece.start == 0 and piece.whole == (stored.ndim == 2)
    assert layout.converted == set()


def test_only_tensors_that_are_taken_apart_are_converted():
    assert not any(
        Layout.of(build(name)).converted
        for name in ("llama", "gpt2", "gpt_oss", "granitemoe", "bert")
    )
    converted = Layout.of(build("mixtral")).converted
    experts = [
        f"model.layers.{layer}.block_sparse_moe.experts.{e}" for layer in range(2) for e in range(3)
    ]
    assert converted == {f"{expert}.{w}.weight" for expert in experts for w in ("w1", "w2", "w3")}


def test_an_expert_is_stored_in_parts():
    model = build("mixtral")
    targets = {target.name: target for unit in find_units(model) for target in unit.targets}
    name, stored = (
        "model.layers.1.mlp.experts.gate_up_proj.2",
        "model.layers.1.block_sparse_moe.experts.2",
    )
    assert Layout.of(model).pieces(name, targets[name]) == (
        Piece(f"{stored}.w1.weight", at=0, start=0, rows=8, whole=True),
        Piece(f"{stored}.w3.weight", at=0, start=8, rows=8, whole=True),
    )


def test_a_model_loaded_from_disk_is_mapped_the_same(tmp_path):
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert Layout.of(loaded)._pieces == Layout.of(model)._pieces


def test_blocks_are_what_is_numbered_first():
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


@pytest.mark.parametrize(
    "order",
    [
        "magnitude:0.5",
        "magnitude:0.5 > rtn(bits=3, group_size=16, symmetric=false)",
        "bitsandbytes(dtype=nf4, double_quant=true)",
        "bitsandbytes:int8",
    ],
)
def test_an_outline_has_everything_but_values(order):
    state = LayerState(torch.randn(32, 64), notes=("a note",))
    for stage in Order.parse(order):
        state = backends.method(stage).apply(state)
    found = outline(state)
    assert found.weight.is_meta and found.weight.shape == (32, 64) and found.notes == ("a note",)
    assert (found.pruned is None) == (state.pruned is None) and type(found.grid) is type(state.grid)
    assert (found.bits, found.weight.dtype) == (state.bits, state.weight.dtype)
    for name in ("unit", "group_size", "symmetric", "dtype", "data_type"):
        assert getattr(found.grid, name, None) == getattr(state.grid, name, None)


def test_pairs_read_a_state_when_it_is_asked_for():
    read = []

    class States(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    pairs = Paired({"a": 1, "b": 2, "c": 3}, States(a="one", b="two"))
    assert list(pairs) == ["a", "b"] and len(pairs) == 2 and not read
    assert pairs["b"] == (2, "two") and read == ["b"]
    assert list(pairs.items()) == [("a", (1, "one")), ("b", (2, "two"))] and read == ["b", "a", "b"]
