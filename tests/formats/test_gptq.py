"""GPTQ checkpoints: there and back bit for bit, and read as their readers do, with an unpacking of another kind."""

import importlib.util
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

from optimum_order import JointCompressor, backends, formats
from optimum_order.artifact import manifest
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError
from optimum_order.files import sha256
from optimum_order.formats.base import Layout
from optimum_order.formats.gptq import BITS, GPTQ
from optimum_order.layers.grids.bitsandbytes import fit_rows
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.models.units import Target, find_units
from optimum_order.order import Order

FORMAT = GPTQ()


@st.composite
def states(draw):
    """Layers of every width, grouping and spelling, with whole groups and rows pruned, zero points at both ends."""
    bits, symmetric = draw(st.sampled_from(BITS)), draw(st.booleans())
    rows, inputs = 32 * draw(st.integers(1, 2)), 32 * draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, inputs, generator=generator) * draw(
        st.sampled_from([0.001, 0.02, 1.0, 300.0])
    )
    weight = (weight + draw(st.sampled_from([0.0, 0.0, 3.0, -3.0])) * weight.std()).to(
        draw(st.sampled_from([torch.float16, torch.bfloat16]))
    )
    pruned = torch.rand(weight.shape, generator=generator) < draw(
        st.sampled_from([0.0, 0.5, 0.95, 1.0])
    )
    if draw(st.booleans()):
        weight = weight.masked_fill(pruned, 0.0)
    size = draw(st.sampled_from([size for size in (-1, 16, 32, 64) if inputs % size == 0]))
    clip = draw(st.sampled_from(["none", "mse"]))
    grid = UniformGrid.fit(weight, bits=bits, group_size=size, symmetric=symmetric, clip=clip)
    return LayerState(grid.nearest(weight).masked_fill(pruned, 0.0), pruned=pruned, grid=grid)


@settings(max_examples=100, deadline=None)
@given(states())
def test_decoding_gives_back_what_was_encoded(state):
    state.check("drawn")
    decoded = FORMAT.decode(FORMAT.encode(state), FORMAT.scheme(state))
    assert decoded.weight.dtype == state.weight.dtype
    assert torch.equal(
        decoded.weight.view(torch.int16), state.weight.view(torch.int16)
    )  # bits: -0.0 is not 0.0
    assert (
        torch.equal(decoded.grid.scale, state.grid.scale)
        and decoded.grid.scale.dtype == state.grid.scale.dtype
    )
    assert (decoded.grid.bits, decoded.grid.inputs) == (state.grid.bits, state.grid.inputs)
    if state.grid.symmetric:
        assert decoded.grid.zero_point is None
    else:
        assert torch.equal(decoded.grid.zero_point, state.grid.zero_point)
    assert decoded.pruned is None


def unpack(words, bits):
    """The fields of one row of int32 words, from a single big integer that has them all."""
    number = sum((word % 2**32) << (32 * i) for i, word in enumerate(words))
    return [number >> (bits * i) & (2**bits - 1) for i in range(len(words) * 32 // bits)]


def as_a_reader(tensors, bits, stored_less_one):
    """W (out, in) in float64, the way the format is documented: no code of ours, no tensor arithmetic in unpacking."""
    codes = torch.tensor(
        [unpack(column, bits) for column in tensors["qweight"].T.tolist()]
    ).double()  # (out, in)
    zeros = (
        torch.tensor([unpack(row, bits) for row in tensors["qzeros"].tolist()]).double().T
        + stored_less_one
    )
    group = tensors["g_idx"].long()
    return (codes - zeros[:, group]) * tensors["scales"].double().T[:, group]


@settings(max_examples=40, deadline=None)
@given(states())
def test_a_reader_finds_the_same_values(state):
    tensors = FORMAT.encode(state)
    assert {tensor.dtype for key, tensor in tensors.items() if key != "scales"} == {torch.int32}
    read = as_a_reader(tensors, state.grid.bits, stored_less_one=state.grid.symmetric)
    assert torch.equal(read.to(state.weight.dtype), state.weight)


def test_three_bits_lie_across_words_as_in_every_gptq_checkpoint():
    """10 codes, 2 bits of the next; its last bit, 10 codes, 1 bit of the next; its last 2 bits, 10 codes."""
    weight = torch.randint(-4, 4, (32, 32)).half()
    weight[:, 0] = -4
    grid = UniformGrid(
        bits=3, scale=torch.ones(32, 1, dtype=torch.float16), zero_point=None, inputs=32
    )
    codes = (weight[0] + 4).int().tolist()
    words = [
        word % 2**32
        for word in FORMAT.encode(LayerState(weight, grid=grid))["qweight"][:, 0].tolist()
    ]
    assert [words[0] >> (3 * i) & 7 for i in range(10)] == codes[:10]
    assert words[0] >> 30 | (words[1] & 1) << 2 == codes[10]
    assert [words[1] >> (3 * i + 1) & 7 for i in range(10)] == codes[11:21]
    assert words[1] >> 31 | (words[2] & 3) << 1 == codes[21]
    assert [words[2] >> (3 * i + 2) & 7 for i in range(10)] == codes[22:]


@pytest.mark.parametrize("bits", BITS)
def test_codes_and_zero_points_take_their_bits_and_no_more(bits):
    weight = torch.randn(64, 96).half()
    grid = UniformGrid.fit(weight, bits=bits, group_size=32)
    tensors = FORMAT.encode(LayerState(grid.nearest(weight), grid=grid))
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "qweight": (96 * bits // 32, 64),
        "qzeros": (3, 64 * bits // 32),
        "scales": (3, 64),
        "g_idx": (96,),
    }
    assert set(unpack(tensors["qzeros"].flatten().tolist(), bits)) == {2 ** (bits - 1) - 1}


# --- what is refused -------------------------------------------------------------------------------------------------


def quantized(shape=(32, 64), dtype=torch.float16, mean=0.0, **options):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + mean).to(dtype)
    grid = UniformGrid.fit(weight, **{"bits": 4} | options)
    return LayerState(grid.nearest(weight), grid=grid)


def linear(kind="linear"):
    return Target("x", kind, nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (quantized(bits=5), "it has 5 bits, and readers of this format take 2, 3, 4 or 8"),
        (
            quantized(dtype=torch.float32),
            "its scales are float32, .* compress the model in float16 or bfloat16",
        ),
        (quantized((40, 64)), r"its shape \(40, 64\) does not divide .* must by 32"),
        (quantized((32, 80)), r"its shape \(32, 80\) does not divide"),
        (
            quantized((32, 96), group_size=48),
            "its groups are of 48, and readers .* take 16, 32, .* or -1",
        ),
        (quantized(dtype=torch.bfloat16, bits=8), "otherwise in float16, .* compress in float16"),
        (
            quantized(dtype=torch.bfloat16, symmetric=False, mean=3.0),
            "otherwise in float16, .* compress in float16",
        ),
        (
            LayerState(torch.ones(32, 64), grid=fit_rows(torch.ones(32, 64))[0]),
            "RowGrid is not a grid of equal steps",
        ),
    ],
)
def test_a_layer_that_cannot_be_held_says_why(state, reason):
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(FORMAT.why_not(linear(), state))
    assert FORMAT.why_not(linear(), LayerState(state.weight)) is None  # it is stored dense


def test_a_layer_that_can_be_held_is_not_refused():
    for bits, symmetric in [(2, True), (3, True), (4, True), (2, False), (3, False)]:
        for mean in (0.0, 3.0):
            state = quantized(dtype=torch.bfloat16, mean=mean, bits=bits, symmetric=symmetric)
            assert FORMAT.why_not(linear(), state) is None
    for bits in BITS:
        assert FORMAT.why_not(linear(), quantized(bits=bits, symmetric=False)) is None
    assert FORMAT.why_not(linear("conv1d"), quantized(group_size=16)) is None
    assert FORMAT.why_not(linear(), quantized((32, 96))) is None
    for kind in ("expert", "conv2d"):
        assert "linear layers only" in FORMAT.why_not(linear(kind), quantized())


SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(dtype=torch.float16, **options):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=128, **options)
    return transformers.LlamaForCausalLM(config).to(dtype)


def compress(model, order, targets=None, others=None):
    """Every target after `order`, but those whose name contains a key of `others` after its value, or without any."""
    layers = {}
    for target in (target for unit in find_units(model, targets) for target in unit.targets):
        chosen = next((text for key, text in (others or {}).items() if key in target.name), order)
        state = LayerState(target.read())
        for stage in Order.parse(chosen) if chosen else ():
            state = backends.method(stage).apply(state)
        if chosen:
            layers[target.name] = (target, state)
    return layers


def refused(model, layers):
    with pytest.raises(FormatError) as caught:
        formats.choose(model, layers, "gptq")
    return str(caught.value)


def test_a_model_that_cannot_be_held_says_why():
    model = llama()
    assert "No layer is quantised" in refused(model, compress(model, "magnitude:0.5"))
    mixed = compress(model, "rtn:4", others={"q_proj": "rtn(bits=4, symmetric=false)"})
    assert "All layers must be symmetric or none" in refused(model, mixed)
    assert "Layer 'lm_head' is outside the blocks" in refused(
        model, compress(model, "rtn:4", ["lm_head"])
    )

    class Special(nn.Linear):
        """Not of the very type that is replaced."""

    model.model.layers[0].mlp.up_proj.__class__ = Special
    layers = compress(model, "rtn:4")
    assert "Layer 'model.layers.0.mlp.up_proj' is outside the blocks or a subclass" in refused(
        model, layers
    )
    bert = transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=128)).half()
    assert "load causal language models, and BertModel is none" in refused(
        bert, compress(bert, "rtn:4")
    )
    experts = {"intermediate_size": 32, "num_local_experts": 2, "num_key_value_heads": 2}
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **experts)).half()
    assert "its kind is 'expert'" in refused(mixtral, compress(mixtral, "rtn:4"))
    attention = compress(mixtral, "rtn:4", ["*self_attn*"])
    assert "Checkpoints of MixtralForCausalLM take fused parameters apart" in refused(
        mixtral, attention
    )


def test_a_bias_that_float16_does_not_hold_is_refused():
    model = llama(torch.bfloat16, attention_bias=True)
    assert formats.choose(model, compress(model, "rtn:4"), "gptq").name == "gptq"
    model.model.layers[1].self_attn.k_proj.bias.data.fill_(1e-6)
    assert "'model.layers.1.self_attn.k_proj' has a bias" in refused(
        model, compress(model, "rtn:4")
    )


def test_auto_never_takes_what_stock_transformers_does_not_load():
    model = llama()
    layers = compress(model, "rtn(bits=4, symmetric=false)")
    assert formats.choose(model, layers, "gptq").name == "gptq"
    assert formats.choose(model, layers).name == "dense"


# --- config.json -----------------------------------------------------------------------------------------------------


def test_a_uniform_model_has_the_keys_everybody_knows():
    model = llama()
    for symmetric, spelling in [(True, "gptq"), (False, "gptq_v2")]:
        layers = compress(model, f"rtn(bits=3, group_size=32, symmetric={str(symmetric).lower()})")
        assert FORMAT.quantization_config(Layout.of(model), layers) == {
            "quant_method": "gptq",
            "checkpoint_format": spelling,
            "bits": 3,
            "group_size": 32,
            "desc_act": False,
            "sym": symmetric,
        }


def test_other_widths_and_dense_layers_are_named_one_by_one():
    model = llama()
    others = {
        "1.mlp.up": "rtn(bits=8, group_size=16)",
        "0.mlp.down": "rtn(bits=4, group_size=64)",
        "o_proj": None,
    }
    layers = compress(
        model, "rtn(bits=4, group_size=64)", others=others | {"v_proj": "magnitude:0.5"}
    )
    config = {"quantization_config": FORMAT.quantization_config(Layout.of(model), layers)}
    entry = json.loads(json.dumps(config))["quantization_config"]
    assert entry["dynamic"] == {
        r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 8, "group_size": 16},
        **{rf"-:^model\.layers\.{i}\.self_attn\.{name}_proj$": {} for i in (0, 1) for name in "vo"},
    }
    held = {name: state for name, (_, state) in layers.items() if state.grid is not None}
    assert entry["modules_in_block_to_quantize"] == [list(held)]
    for name, state in held.items():
        said = FORMAT.scheme_in(config, [name])
        assert said == {"bits": state.grid.bits, "group_size": said["group_size"], "sym": True}
        assert said["group_size"] in (state.grid.group_size, state.grid.unit)
        assert torch.equal(FORMAT.decode(FORMAT.encode(state), said).weight, state.weight)
    with pytest.raises(ArtifactError, match="says that it is not quantised"):
        FORMAT.scheme_in(config, ["model.layers.0.self_attn.o_proj"])


ENTRY = {
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
    "bits": 4,
    "group_size": 64,
    "desc_act": False,
    "sym": True,
}


@pytest.mark.parametrize(
    "change",
    [
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
    ],
)
def test_a_config_that_is_not_ours_is_refused(change):
    assert FORMAT.scheme_in({"quantization_config": ENTRY}, ["x"]) == {
        "bits": 4,
        "group_size": 64,
        "sym": True,
    }
    with pytest.raises(ArtifactError):
        FORMAT.scheme_in({"quantization_config": ENTRY | change}, ["x"])


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["gptq", "gptq_v2", "+:^x$", "-:^x$", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*ENTRY, "dynamic", "+:^x$", "z"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*ENTRY, "dynamic", "modules_in_block_to_quantize"]), json_values
    ),
    json_values,
)
def test_any_config_is_read_or_refused(change, whole):
    for entry in (ENTRY | change, whole):
        try:
            found = FORMAT.scheme_in({"quantization_config": entry}, ["x"])
        except ArtifactError:
            continue
        assert (
            found["bits"] in BITS
            and type(found["group_size"]) is int
            and type(found["sym"]) is bool
        )


# --- damaged tensors -------------------------------------------------------------------------------------------------


@pytest.fixture
def packed():
    state = quantized(bits=3, group_size=16)
    return FORMAT.encode(state), FORMAT.scheme(state)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("g_idx"), "has the tensors"),
        (lambda t: t.update(weight=t["scales"]), "has the tensors"),
        (lambda t: t.update(qweight=t["qweight"].long()), "must be int32"),
        (lambda t: t.update(qweight=t["qweight"][0]), "must be int32, the first of them a matrix"),
        (lambda t: t.update(qweight=t["qweight"][1:]), "are no layer with groups of 16"),
        (lambda t: t.update(qweight=t["qweight"][:0]), "are no layer with groups of 16"),
        (lambda t: t.update(qweight=t["qweight"][:, :0]), "are no layer with groups of 16"),
        (lambda t: t.update(qweight=t["qweight"][:, 1:]), "are no layer with groups of 16"),
        (lambda t: t.update(qzeros=t["qzeros"][:, 1:]), "do not fit"),
        (lambda t: t.update(qzeros=t["qzeros"] + 1), "must all be stored as 3"),
        (lambda t: t.update(qzeros=t["qzeros"].short()), "must be int32"),
        (lambda t: t.update(scales=t["scales"][:3]), "do not fit"),
        (
            lambda t: t.update(scales=t["scales"].float()),
            "finite and positive, in float16 or bfloat16",
        ),
        (lambda t: t["scales"].zero_(), "finite and positive"),
        (lambda t: t["scales"].fill_(float("inf")), "finite and positive"),
        (lambda t: t.update(g_idx=t["g_idx"].flip(0)), "g_idx must number the groups"),
        (lambda t: t.update(g_idx=t["g_idx"][:-1]), "g_idx must number the groups"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(packed, change, reason):
    tensors, scheme = packed
    change(tensors)
    with pytest.raises(ArtifactError, match=reason):
        FORMAT.decode(tensors, scheme)


def arrays(*dtypes):
    shapes = st.lists(st.integers(0, 8) | st.sampled_from([12, 32, 64]), max_size=3)
    return st.builds(
        lambda shape, dtype: torch.ones(shape, dtype=dtype), shapes, st.sampled_from(dtypes)
    )


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            key: arrays(torch.int32, torch.int32, torch.float16, torch.int64)
            for key in ("qweight", "qzeros", "g_idx")
        }
        | {"scales": arrays(torch.float16, torch.float32)}
    ),
    st.sampled_from(BITS),
    st.sampled_from([-1, 16, 64]),
    st.booleans(),
)
def test_any_tensors_are_read_or_refused(tensors, bits, size, symmetric):
    try:
        state = FORMAT.decode(tensors, {"bits": bits, "group_size": size, "sym": symmetric})
    except ArtifactError:
        return
    state.check("decoded")


# --- whole artifacts -------------------------------------------------------------------------------------------------


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
    at = (weight[0] != 0).nonzero()[0, 0].item()  # the code of a weight that is there
    facts = manifest.load(tmp_path / "out")
    assert facts["format"] == "gptq"
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    bits = facts["layers"][name]["bits"]
    word, shift = divmod(at * bits, 32)
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
    compressed = saved(
        transformers.GPT2LMHeadModel(config).half(), tmp_path / "out", "rtn(bits=4, group_size=32)"
    )
    assert verify(tmp_path / "out") == []
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    held = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    name = "h.0.attn.c_attn"
    layer = {local: held[f"{name}.{local}"] for local in GPTQ.tensors}
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
    """It must not give a model of random weights. optimum without GPTQModel misses the name QuantizeConfig."""
    saved(llama(), tmp_path / "out", "rtn(bits=4, group_size=32)")
    ran = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("refused:")
