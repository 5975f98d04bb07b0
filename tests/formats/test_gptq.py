"""GPTQ checkpoints: there and back bit for bit, and read with an unpacking of another kind."""

import contextlib
import importlib.util
import itertools
import json
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from optimum_order import JointCompressor, formats
from optimum_order.artifact import manifest
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError
from optimum_order.files import sha256
from optimum_order.formats.base import Layers
from optimum_order.formats.gptq import BITS, GPTQ
from optimum_order.layers.grids.bitsandbytes import fit_rows
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.testing import CodecContract, same_bits

CODEC = GPTQ()


def quantized(shape=(32, 64), dtype=torch.float16, mean=0.0, **options):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean).to(dtype)
    grid = UniformGrid.fit(weight, **{"bits": 4} | options)
    return LayerState(grid.nearest(weight), grid=grid)


REFUSED = [
    (quantized(bits=5), "it has 5 bits, and readers of this format take 2, 3, 4 or 8"),
    (
        quantized(dtype=torch.float32),
        "its scales are float32, .* compress the model in float16 or bfloat16",
    ),
    (quantized((40, 64)), r"its shape \(40, 64\) does not divide .* must by 32"),
    (quantized((32, 80)), r"its shape \(32, 80\) does not divide"),
    (quantized((32, 96), group_size=48), "groups are of 48, and readers .* 16, 32, .* or -1"),
    (quantized(dtype=torch.bfloat16, bits=8), "otherwise in float16, .* compress in float16"),
    (
        quantized(dtype=torch.bfloat16, symmetric=False, mean=3.0),
        "otherwise in float16, .* compress in float16",
    ),
    (
        LayerState(torch.ones(32, 64), grid=fit_rows(torch.ones(32, 64))[0]),
        "RowGrid is not a grid of equal steps",
    ),
]


class TestContract(CodecContract):
    def codec(self):
        return CODEC

    def states(self):
        for bits, size, symmetric in itertools.product(BITS, [-1, 16, 64], [True, False]):
            yield quantized(bits=bits, group_size=size, symmetric=symmetric)
        for bits, symmetric in [(2, True), (3, True), (4, True), (2, False), (3, False)]:
            for mean in (0.0, 3.0):
                options = {"bits": bits, "symmetric": symmetric}
                yield quantized(dtype=torch.bfloat16, mean=mean, **options)
        yield quantized((32, 96))

    def refused(self):
        yield from (state for state, _ in REFUSED)


@st.composite
def states(draw):
    """Layers of every width, grouping and spelling, pruned, with zero points at both ends."""
    bits = draw(st.sampled_from(BITS))
    rows = 32 * draw(st.integers(1, 2))
    inputs = 32 * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.001, 0.02, 1.0, 300.0]))
    weight = torch.randn(rows, inputs, generator=generator) * spread
    weight += draw(st.sampled_from([0.0, 0.0, 3.0, -3.0])) * weight.std()
    weight = weight.to(draw(st.sampled_from([torch.float16, torch.bfloat16])))
    share = draw(st.sampled_from([0.0, 0.5, 0.95, 1.0]))
    pruned = torch.rand(weight.shape, generator=generator) < share
    if draw(st.booleans()):
        weight = weight.masked_fill(pruned, 0.0)
    grid = UniformGrid.fit(
        weight,
        bits=bits,
        group_size=draw(st.sampled_from([n for n in (-1, 16, 32, 64) if inputs % n == 0])),
        symmetric=draw(st.booleans()),
        clip=draw(st.sampled_from(["none", "mse"])),
    )
    return LayerState(grid.nearest(weight).masked_fill(pruned, 0.0), pruned=pruned, grid=grid)


def unpack(words, bits):
    """The fields of one row of int32 words, from a single big integer that has them all."""
    number = sum((word % 2**32) << (32 * i) for i, word in enumerate(words))
    return [number >> (bits * i) & (2**bits - 1) for i in range(len(words) * 32 // bits)]


def as_a_reader(tensors, bits, stored_less_one):
    """W (out, in) in float64, as the format is documented, with no code of ours."""
    codes = torch.tensor([unpack(column, bits) for column in tensors["qweight"].T.tolist()])
    zeros = torch.tensor([unpack(row, bits) for row in tensors["qzeros"].tolist()]).T
    group = tensors["g_idx"].long()
    steps = codes.double() - (zeros.double() + stored_less_one)[:, group]
    return steps * tensors["scales"].double().T[:, group]


@settings(max_examples=60, deadline=None)
@given(states())
def test_any_layer_comes_back_as_it_was_and_a_reader_finds_the_same_values(state):
    state.check("drawn")
    tensors = CODEC.encode(state)
    decoded = CODEC.decode(tensors, CODEC.scheme(state))
    assert same_bits(decoded.weight, state.weight)
    assert same_bits(decoded.grid.scale, state.grid.scale)
    assert (decoded.grid.bits, decoded.grid.inputs) == (state.grid.bits, state.grid.inputs)
    assert decoded.grid.symmetric == state.grid.symmetric and decoded.pruned is None
    if not state.grid.symmetric:
        assert torch.equal(decoded.grid.zero_point, state.grid.zero_point)
    assert {tensor.dtype for key, tensor in tensors.items() if key != "scales"} == {torch.int32}
    read = as_a_reader(tensors, state.grid.bits, stored_less_one=state.grid.symmetric)
    assert torch.equal(read.to(state.weight.dtype), state.weight)


def test_three_bits_lie_across_words_as_in_every_gptq_checkpoint():
    """10 codes, 2 bits of the next; its last bit, 10 codes, 1 bit of the next; 2 bits, 10 codes."""
    weight = torch.randint(-4, 4, (32, 32)).half()
    weight[:, 0] = -4
    scale = torch.ones(32, 1, dtype=torch.float16)
    grid = UniformGrid(bits=3, scale=scale, zero_point=None, inputs=32)
    codes = (weight[0] + 4).int().tolist()
    qweight = CODEC.encode(LayerState(weight, grid=grid))["qweight"]
    words = [word % 2**32 for word in qweight[:, 0].tolist()]
    assert [words[0] >> (3 * i) & 7 for i in range(10)] == codes[:10]
    assert words[0] >> 30 | (words[1] & 1) << 2 == codes[10]
    assert [words[1] >> (3 * i + 1) & 7 for i in range(10)] == codes[11:21]
    assert words[1] >> 31 | (words[2] & 3) << 1 == codes[21]
    assert [words[2] >> (3 * i + 2) & 7 for i in range(10)] == codes[22:]


def test_codes_and_zero_points_take_their_bits_and_no_more():
    for bits in BITS:
        tensors = CODEC.encode(quantized((64, 96), bits=bits, group_size=32))
        assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
            "qweight": (96 * bits // 32, 64),
            "qzeros": (3, 64 * bits // 32),
            "scales": (3, 64),
            "g_idx": (96,),
        }
        assert set(unpack(tensors["qzeros"].flatten().tolist(), bits)) == {2 ** (bits - 1) - 1}


# What is refused


def test_a_layer_that_cannot_be_held_says_why(target_of):
    for state, reason in REFUSED:
        said = CODEC.why_not(target_of("linear"), state)
        with pytest.raises(FormatError, match=reason):
            raise FormatError(said)
        assert not CODEC.encodes(LayerState(state.weight))  # it is stored dense
    assert CODEC.why_not(target_of("conv1d"), quantized(group_size=16)) is None
    for kind in ("expert", "conv2d"):
        assert "linear layers only" in CODEC.why_not(target_of(kind), quantized())


def test_values_that_float16_does_not_hold_are_refused(target_of):
    """A bfloat16 scale may be so small that its products are subnormal in float16."""
    weight = torch.randint(-8, 8, (32, 32)).bfloat16()
    for exponent in (-17, -18):
        scale = torch.full((32, 1), 1.0078125 * 2.0**exponent, dtype=torch.bfloat16)
        grid = UniformGrid(bits=4, scale=scale, zero_point=None, inputs=32)
        state = LayerState(grid.dequantize(weight.short()), grid=grid)
        assert CODEC.why_not(target_of("linear"), state) is None
        reason = CODEC.why_not_values(state)
        assert reason is None if exponent == -17 else "compress in float16" in reason


SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(dtype=torch.float16, **options):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=128, **options)
    return transformers.LlamaForCausalLM(config).to(dtype)


def refused(contents):
    with pytest.raises(FormatError) as caught:
        formats.choose(contents, "gptq")
    return str(caught.value)


def test_a_model_that_cannot_be_held_says_why(compressed):
    assert "No layer is quantized" in refused(compressed(llama(), "magnitude:0.5"))
    mixed = compressed(llama(), "rtn:4", special={"q_proj": "rtn(bits=4, symmetric=false)"})
    assert "All layers must be symmetric or none" in refused(mixed)
    assert "Layer 'lm_head' is outside the blocks" in refused(
        compressed(llama(), "rtn:4", ["lm_head"])
    )

    class Special(nn.Linear):
        """Not of the very type that is replaced."""

    model = llama()
    model.model.layers[0].mlp.up_proj.__class__ = Special
    reason = "Layer 'model.layers.0.mlp.up_proj' is outside the blocks or a subclass"
    assert reason in refused(compressed(model, "rtn:4"))
    bert = transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=128)).half()
    reason = "load causal language models, and BertModel is none"
    assert reason in refused(compressed(bert, "rtn:4"))
    experts = {"intermediate_size": 32, "num_local_experts": 2, "num_key_value_heads": 2}
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **experts)).half()
    assert "its kind is 'expert'" in refused(compressed(mixtral, "rtn:4"))
    reason = "Checkpoints of MixtralForCausalLM take fused parameters apart"
    assert reason in refused(compressed(mixtral, "rtn:4", ["*self_attn*"]))


def test_a_bias_that_float16_does_not_hold_is_refused(compressed):
    model = llama(torch.bfloat16, attention_bias=True)
    assert formats.choose(compressed(model, "rtn:4"), "gptq").name == "gptq"
    model.model.layers[1].self_attn.k_proj.bias.data.fill_(1e-6)
    reason = "'model.layers.1.self_attn.k_proj' has a bias"
    assert reason in refused(compressed(model, "rtn:4"))


def test_auto_never_takes_what_stock_transformers_does_not_load(compressed):
    contents = compressed(llama(), "rtn(bits=4, symmetric=false)")
    assert formats.choose(contents, "gptq").name == "gptq"
    assert formats.choose(contents).name == "dense"


# config.json


def config_of(contents):
    states = {name: state for name, _, state in contents.layers if CODEC.encodes(state)}
    entry = CODEC.quantization_config(contents.layout, Layers(contents.layers.targets, states))
    return {"quantization_config": json.loads(json.dumps(entry))}, states


def test_a_uniform_model_has_the_keys_everybody_knows(compressed):
    for symmetric, spelling in [("true", "gptq"), ("false", "gptq_v2")]:
        order = f"rtn(bits=3, group_size=32, symmetric={symmetric})"
        config, _ = config_of(compressed(llama(), order))
        assert config["quantization_config"] == {
            "quant_method": "gptq",
            "checkpoint_format": spelling,
            "bits": 3,
            "group_size": 32,
            "desc_act": False,
            "sym": symmetric == "true",
        }


def test_other_widths_and_dense_layers_are_named_one_by_one(compressed):
    special = {
        "1.mlp.up": "rtn(bits=8, group_size=16)",
        "0.mlp.down": "rtn(bits=4, group_size=64)",
        "o_proj": None,
        "v_proj": "magnitude:0.5",
    }
    config, states = config_of(compressed(llama(), "rtn(bits=4, group_size=64)", None, special))
    entry = config["quantization_config"]
    assert entry["dynamic"] == {
        r"+:^(?:.*\.)?layers\.1\.mlp\.up_proj$": {"bits": 8, "group_size": 16},
        **{
            rf"-:^(?:.*\.)?layers\.{i}\.self_attn\.{name}_proj$": {}
            for i in (0, 1)
            for name in "vo"
        },
    }
    inner = [name.removeprefix("model.") for name in states]
    assert entry["modules_in_block_to_quantize"] == [inner]
    for name, state in states.items():
        scheme = CODEC.scheme_in(config, [name])
        assert (scheme["bits"], scheme["sym"]) == (state.grid.bits, True)
        assert scheme["group_size"] in (state.grid.group_size, state.grid.unit)
        assert torch.equal(CODEC.decode(CODEC.encode(state), scheme).weight, state.weight)
    with pytest.raises(ArtifactError, match="says that it is not quantized"):
        CODEC.scheme_in(config, ["model.layers.0.self_attn.o_proj"])


ENTRY = {
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "bits": 4,
    "group_size": 64,
    "desc_act": False,
    "sym": True,
}


def test_a_config_that_is_not_ours_is_refused():
    good = {"quantization_config": ENTRY}
    assert CODEC.scheme_in(good, ["x"]) == {"bits": 4, "group_size": 64, "sym": True}
    for change in [
        {"bits": None},
        {"bits": 5},
        {"bits": True},
        {"bits": "4"},
        {"group_size": 48},
        {"group_size": 0},
        {"group_size": [64]},
        {"sym": 1},
        {"sym": False},
        {"desc_act": True},
        {"checkpoint_format": "gptq_v2"},
        {"checkpoint_format": ["gptq"]},
        {"pack_dtype": "int8"},
        {"dynamic": []},
        {"dynamic": {"+:.*": {"bits": 8}}},
        {"dynamic": {"(a+)+$": {}}},
        {"dynamic": {"": {}}},
        {"dynamic": {"-:^x$": {}}},
        {"dynamic": {"+:^x$": {"bits": 4, "sym": False}}},
        {"dynamic": {"+:^x$": {"bits": 16}}},
        {"dynamic": {"+:^x$": {"group_size": "64"}}},
        {"dynamic": {"+:^x$": 3}},
    ]:
        with pytest.raises(ArtifactError):
            CODEC.scheme_in({"quantization_config": ENTRY | change}, ["x"])


WORDS = ["gptq", "gptq_v2", "+:^x$", "-:^x$", ""]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS)
KEYS = st.sampled_from([*ENTRY, "dynamic", "+:^x$", "z"])
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
CHANGES = st.dictionaries(
    st.sampled_from([*ENTRY, "dynamic", "modules_in_block_to_quantize"]), JSON
)


@settings(max_examples=100, deadline=None)
@given(CHANGES, JSON)
def test_any_config_is_read_or_refused(change, whole):
    for entry in (ENTRY | change, whole):
        try:
            scheme = CODEC.scheme_in({"quantization_config": entry}, ["x"])
        except ArtifactError:
            continue
        assert scheme["bits"] in BITS
        assert type(scheme["group_size"]) is int and type(scheme["sym"]) is bool


# Damaged tensors


def test_tensors_that_do_not_fit_are_refused():
    state = quantized(bits=3, group_size=16)
    qweight, qzeros, scales, g_idx = (CODEC.encode(state)[name] for name in CODEC.tensors)
    for change, reason in [
        ({"g_idx": None}, "has the tensors"),
        ({"weight": scales}, "has the tensors"),
        ({"qweight": qweight.long()}, "must be int32"),
        ({"qweight": qweight[0]}, "must be int32, the first of them a matrix"),
        ({"qweight": qweight[1:]}, "are no layer with groups of 16"),
        ({"qweight": qweight[:0]}, "are no layer with groups of 16"),
        ({"qweight": qweight[:, :0]}, "are no layer with groups of 16"),
        ({"qweight": qweight[:, 1:]}, "are no layer with groups of 16"),
        ({"qzeros": qzeros[:, 1:]}, "do not fit"),
        ({"qzeros": qzeros + 1}, "must all be stored as 3"),
        ({"qzeros": qzeros.short()}, "must be int32"),
        ({"scales": scales[:3]}, "do not fit"),
        ({"scales": scales.float()}, "finite and positive, in float16 or bfloat16"),
        ({"scales": scales * 0}, "finite and positive"),
        ({"scales": torch.full_like(scales, float("inf"))}, "finite and positive"),
        ({"g_idx": g_idx.flip(0)}, "g_idx must number the groups"),
        ({"g_idx": g_idx[:-1]}, "g_idx must number the groups"),
    ]:
        tensors = CODEC.encode(state) | change
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        with pytest.raises(ArtifactError, match=reason):
            CODEC.decode(present, CODEC.scheme(state))


def arrays(*dtypes):
    shapes = st.lists(st.integers(0, 8) | st.sampled_from([12, 32, 64]), max_size=3)
    return st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, st.sampled_from(dtypes)
    )


CODES = arrays(torch.int32, torch.int32, torch.float16, torch.int64)
TENSORS = {"qweight": CODES, "qzeros": CODES, "g_idx": CODES}
SCALES = arrays(torch.float16, torch.float32)


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(TENSORS | {"scales": SCALES}),
    st.sampled_from(BITS),
    st.sampled_from([-1, 16, 64]),
    st.booleans(),
)
def test_any_tensors_are_read_or_refused(tensors, bits, size, symmetric):
    with contextlib.suppress(ArtifactError):
        state = CODEC.decode(tensors, {"bits": bits, "group_size": size, "sym": symmetric})
        state.check("decoded")


# Whole artifacts


def saved(model, folder, order, **options):
    compressed = JointCompressor(model, **options).compress(order, progress=False)
    assert compressed.save_pretrained(folder, format="gptq") == "gptq"
    return compressed


@pytest.mark.parametrize(
    ("order", "dtype"),
    [
        ("magnitude:0.5 > rtn(bits=4, group_size=32)", torch.bfloat16),
        ("rtn(bits=3, group_size=16, symmetric=false) > magnitude:0.5", torch.bfloat16),
        ("rtn(bits=2, symmetric=false)", torch.float16),
        ("rtn:8", torch.float16),
    ],
)
def test_an_artifact_verifies_and_a_changed_code_is_seen(tmp_path, order, dtype):
    name = "model.layers.1.mlp.up_proj"
    compressed = saved(llama(dtype), tmp_path / "out", order)
    assert verify(tmp_path / "out") == []
    weight = compressed.layers[name].weight
    at = (weight[0] != 0).nonzero()[0, 0].item()  # the code of a weight that is not zero
    facts = manifest.load(tmp_path / "out")
    assert facts["format"] == "gptq"
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    word, shift = divmod(at * facts["layers"][name]["bits"], 32)
    tensors[f"{name}.qweight"][word, 0] ^= 1 << shift
    save_file(tensors, file, metadata={manifest.KEY: facts["order"], "format": "pt"})
    facts["files"][file.name] = {"sha256": sha256(file), "bytes": file.stat().st_size}
    manifest.write(facts, tmp_path / "out")
    assert verify(tmp_path / "out") == [
        f"layer {name} does not decode to the values that were measured."
    ]


def test_a_conv1d_is_stored_like_any_layer(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).half()
    compressed = saved(model, tmp_path / "out", "rtn(bits=4, group_size=32)")
    assert verify(tmp_path / "out") == []
    stored = load_file(tmp_path / "out" / "model.safetensors")
    by_name = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    name = "h.0.attn.c_attn"
    layer = {local: by_name[f"{name}.{local}"] for local in GPTQ.tensors}
    assert layer["qweight"].shape == (64 * 4 // 32, 192)
    read = as_a_reader(layer, 4, stored_less_one=True)
    assert torch.equal(read.half(), compressed.layers[f"transformer.{name}"].weight)


def test_layers_left_alone_stay_dense(tmp_path):
    saved(llama(), tmp_path / "out", "rtn(bits=4, group_size=32)", targets=["*.mlp.*"])
    assert verify(tmp_path / "out") == []
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors if ".mlp." in key} == set(GPTQ.tensors)
    assert {key.rpartition(".")[2] for key in tensors if ".mlp." not in key} == {"weight"}


LOAD = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except (ImportError, NameError) as error:
    print("refused:", error)
else:
    print("loaded")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is not None, reason="transformers loads it here"
)
def test_without_gptqmodel_stock_transformers_refuses_it(tmp_path):
    """It must not give random weights. optimum without GPTQModel misses the name QuantizeConfig."""
    saved(llama(), tmp_path / "out", "rtn(bits=4, group_size=32)")
    command = [sys.executable, "-c", LOAD, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused:")
