"""Choosing a format: the smallest that holds everything, or a refusal that names what can."""

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optimum_order import JointCompressor, formats, registry
from optimum_order.artifact import hub, manifest
from optimum_order.artifact.convert import convert
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError
from optimum_order.formats import Codec, Container, Contents, Layers, Written, outline, transcode
from optimum_order.layers.state import LayerState
from optimum_order.models import hf

SHAPE = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"vocab_size": 61, "n_embd": 64, "n_layer": 1, "n_head": 2, "bos_token_id": 1}
MOE = {"num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 64, "num_experts": 2}
CONFIGS = {
    "llama": SHAPE | {"intermediate_size": 128},
    "gpt2": GPT2 | {"eos_token_id": 1},
    "mixtral": SHAPE | {"num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 2},
    "qwen3_moe": SHAPE | MOE | {"num_experts_per_tok": 1, "intermediate_size": 64},
    "llama4_text": SHAPE
    | {"num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1}
    | {"intermediate_size": 32, "intermediate_size_mlp": 32, "moe_layers": [0]},
}
LAST = {  # the very last layer of each
    "llama": "down_proj",
    "mixtral": "experts.down_proj.1",
    "qwen3_moe": "experts.down_proj.1",
}


def build(name):
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    return transformers.AutoModelForCausalLM.from_config(config)


def test_every_format_is_discovered_and_described():
    codecs = formats.available()
    assert list(codecs) == [
        *("bitsandbytes", "coded", "compressed-tensors", "dense", "gguf", "gptq", "sparse")
    ]
    assert all(cls.name == name and cls.summary for name, cls in codecs.items())
    assert [name for name, cls in codecs.items() if not cls.runs_dense] == ["bitsandbytes"]
    assert [name for name, cls in codecs.items() if not cls.stock] == [
        *("coded", "gguf", "gptq", "sparse")
    ]
    assert list(formats.containers()) == ["gguf", "safetensors"]
    for name in codecs:
        kind = "gguf" if name == "gguf" else "safetensors"
        assert formats.container(name).name == kind


def test_auto_takes_the_smallest_that_holds_every_layer(compressed):
    for order, expected in [
        ("magnitude:0.5", "dense"),
        ("rtn:4", "compressed-tensors"),
        ("rtn:4 > magnitude:0.5", "compressed-tensors"),
        ("rtn:4 > magnitude(sparsity=0.5, off_grid=true)", "dense"),
        ("rtn(bits=4, symmetric=false)", "dense"),
        ("bitsandbytes:nf4", "bitsandbytes"),
        ("bitsandbytes:int8 > magnitude:0.5", "bitsandbytes"),
        ("bitsandbytes:nf4 > rtn:4", "compressed-tensors"),
    ]:
        assert formats.choose(compressed(build("llama"), order)).name == expected, order


def test_auto_counts_scales_too(compressed):
    """For every pair of 8-bit codes a float32 scale: no smaller than bfloat16 weights."""
    for order, expected in [
        ("rtn(bits=8, group_size=2)", "dense"),
        ("rtn(bits=8, group_size=32)", "compressed-tensors"),
    ]:
        contents = compressed(build("llama").to(torch.bfloat16), order)
        assert formats.choose(contents).name == expected


def test_choosing_encodes_nothing_and_reads_each_state_once(compressed, monkeypatch):
    contents = compressed(build("llama"), "rtn:4")
    reads = []

    class States(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    for codec in formats.available().values():

        def encode(self, state):
            assert state.weight.is_meta, "a layer was encoded"
            return {"weight": state.weight}

        monkeypatch.setattr(codec, "encode", encode)
    states = States(contents.layers.states)
    lazy = Contents(contents.model, Layers(contents.layers.targets, states))
    assert formats.choose(lazy).name == "compressed-tensors"
    assert reads == list(states)


def test_an_explicit_format_that_cannot_hold_a_layer_is_refused(compressed):
    for name, order, format, reason, able in [
        ("llama", "magnitude:0.5", "compressed-tensors", "No layer is quantized", "dense"),
        ("llama", "magnitude:0.5", "bitsandbytes", "No layer is quantized", "dense"),
        (
            "llama",
            "rtn:4",
            "bitsandbytes",
            "Layer 'model.layers.0.self_attn.q_proj': its UniformGrid is not",
            "compressed",
        ),
        (
            "llama",
            "bitsandbytes:nf4",
            "compressed-tensors",
            "its BlockGrid is not a grid of equal steps",
            "bitsandbytes",
        ),
        (
            "llama",
            "rtn(bits=4, symmetric=false)",
            "compressed-tensors",
            "its grid has zero points",
            "dense",
        ),
        (
            "gpt2",
            "rtn:4",
            "compressed-tensors",
            "'transformer.h.0.attn.c_attn': it is a GPT-2 Conv1D",
            "dense",
        ),
        ("mixtral", "bitsandbytes:int8", "bitsandbytes", "it is a fused expert", "dense"),
        (
            "llama4_text",
            "rtn(bits=4, group_size=32)",
            "compressed-tensors",
            "transformers replaces 'model.layers.0.feed_forward.experts' (Llama4TextExperts)",
            "dense",
        ),
    ]:
        contents = compressed(build(name), order)
        with pytest.raises(FormatError, match=re.escape(reason)) as caught:
            formats.choose(contents, format)
        assert f"Format '{format}' cannot hold this model" in str(caught.value)
        assert re.search(rf"{able}.* can; choose", str(caught.value))


def test_what_shapes_and_grids_rule_out_is_refused_before_anything_is_compressed(compressed):
    for name, dtype, order, format, reason in [
        ("llama", "float32", "bitsandbytes:nf4", "compressed-tensors", "BlockGrid"),
        ("llama", "float32", "rtn:4", "bitsandbytes", "UniformGrid"),
        ("gpt2", "float32", "rtn:4", "compressed-tensors", "Conv1D"),
        ("mixtral", "float32", "bitsandbytes:int8", "bitsandbytes", "fused expert"),
        ("llama", "bfloat16", "rtn:8", "gptq", "compress in float16"),
        ("llama", "float16", "bitsandbytes:int8", "sparse", "RowGrid"),
    ]:
        contents = compressed(build(name).to(getattr(torch, dtype)), order)
        outlines = {key: outline(state) for key, state in contents.layers.states.items()}
        empty = build(name).to(getattr(torch, dtype)).to("meta")
        before = Contents(empty, Layers(contents.layers.targets, outlines))
        with pytest.raises(FormatError, match=reason) as caught:
            formats.choose(before, format)
        with pytest.raises(FormatError, match=re.escape(str(caught.value).rpartition(". ")[0])):
            formats.choose(contents, format)
        assert formats.choose(before).name == formats.choose(contents).name


def test_inputs_that_are_rounded_are_held_by_one_format_or_refused(compressed, caplog):
    eight = compressed(build("llama"), "rtn:8 > activations:8")
    assert formats.choose(eight).name == "compressed-tensors"
    for name in formats.available():
        if name != "compressed-tensors":
            with pytest.raises(FormatError) as caught:
                formats.choose(eight, name)
            assert "its inputs are rounded (int8 per token), and" in str(caught.value), name
            assert str(caught.value).endswith("choose 'compressed-tensors' or 'auto'.")
    for order, advice in [
        ("magnitude:0.5 > activations:8", "add a stage such as rtn(bits=8, group_size=-1)."),
        ("rtn:8 > activations:fp8", "use activations:8."),
        ("rtn:fp8 > activations:8", "use activations:fp8."),
        ("ecsq:4 > activations:8", "Use gptq or rtn in place of ecsq."),
        ("rtn(bits=4, symmetric=false) > activations:8", "use symmetric=true."),
    ]:
        contents = compressed(build("llama"), order)
        for name in ("auto", "dense", "compressed-tensors"):
            with pytest.raises(FormatError) as caught:
                transcode.choose(contents, name)
            assert "\n" not in str(caught.value)
        with pytest.raises(FormatError, match=re.escape(advice)):
            transcode.choose(contents, "auto")


def test_convolutions_are_left_dense_by_what_loads_linear_layers_only(make_image_model, compressed):
    for order in ("rtn:4", "bitsandbytes(dtype=nf4, blocksize=32)", "bitsandbytes:int8"):
        model = make_image_model("resnet", embedding_size=32, hidden_sizes=[32, 32])
        contents = compressed(model, order)
        assert formats.choose(contents).name == "dense"
        for name in ("compressed-tensors", "bitsandbytes"):
            own = (name == "bitsandbytes") == (name in order)  # the grid is of that library
            reason = "it is a convolution" if own or name == "compressed-tensors" else "grid"
            pattern = rf"hold this model\. Layer 'resnet\.encoder.*{reason}.*'dense' or 'auto'"
            with pytest.raises(FormatError, match=pattern):
                formats.choose(contents, name)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_compressed_tensors_wants_all_experts_or_none_of_the_model(compressed, name):
    """transformers unpacks all experts with one scheme, and drops any that are not packed."""
    everything = "All experts must be quantized along with the rest of the model"
    alike = "All experts must have one width and group size"
    for targets, last, reason in [
        (["*self_attn*"], "rtn:4", everything),
        (None, "magnitude:0.5", everything),
        (None, "rtn:8", alike),
        (None, "rtn(bits=4, group_size=16)", alike),
    ]:
        contents = compressed(build(name), "rtn:4", targets, {LAST[name]: last})
        with pytest.raises(FormatError, match=reason):
            formats.choose(contents, "compressed-tensors")
        assert formats.choose(contents).name == "dense"
    contents = compressed(build(name), "rtn(bits=4, group_size=32)", ["*experts*"])
    assert formats.choose(contents).name == "compressed-tensors"


def test_bitsandbytes_wants_one_data_type(compressed):
    nf4 = "bitsandbytes:nf4"
    contents = compressed(build("llama"), nf4, special={"down_proj": "bitsandbytes:int8"})
    pattern = r"All layers must have one data type, these have 2: .*int8.*nf4"
    with pytest.raises(FormatError, match=pattern):
        formats.choose(contents, "bitsandbytes")
    assert formats.choose(contents).name == "dense"
    other = {"down_proj": "bitsandbytes(dtype=nf4, blocksize=128)"}
    contents = compressed(build("llama"), nf4, special=other)
    assert formats.choose(contents).name == "bitsandbytes"


def test_bitsandbytes_refuses_what_transformers_would_load_dense(compressed):
    """T5 keeps modules called `wo` in float32 whatever the checkpoint says."""
    model = build("llama")
    model._keep_in_fp32_modules = ["up_proj"]
    contents = compressed(model, "bitsandbytes:nf4")
    with pytest.raises(FormatError, match=r"would load layer 'model.layers.0.mlp.up_proj' dense"):
        formats.choose(contents, "bitsandbytes")

    class Special(torch.nn.Linear):
        """Not of the very type that transformers replaces."""

    model = build("llama")
    model.model.layers[0].mlp.up_proj.__class__ = Special
    contents = compressed(model, "bitsandbytes:nf4")
    pattern = r"'model.layers.0.mlp.up_proj' is a subclass of nn.Linear"
    with pytest.raises(FormatError, match=pattern):
        formats.choose(contents, "bitsandbytes")


def test_an_unknown_format_gets_a_suggestion(compressed):
    contents = compressed(build("llama"), "rtn:4")
    with pytest.raises(FormatError, match=r"Unknown format .*Did you mean 'compressed-tensors'\?"):
        formats.choose(contents, "compressed_tensors")
    with pytest.raises(ArtifactError, match=r"'onnx', which is no format that is installed"):
        formats.container("onnx")


# A container and a codec of somebody else's, in one file


class Drawer(Container):
    """All tensors in `model.drawer`, encoded ones under the name of their layer."""

    name = "drawer"
    patterns = ("*.drawer",)

    def write(self, contents, codec, folder, *, header, max_shard_size="5GB"):
        contents.model.save_pretrained(folder, state_dict={})
        dense = hf.to_checkpoint(contents.model, hf.tensors_to_save(contents.model))
        tensors = {f"plain/{key}": tensor.contiguous() for key, tensor in dense.items()}
        size = 0
        for name, _, state in contents.layers:
            del tensors[f"plain/{name}.weight"]
            encoded = codec.encode(state)
            tensors |= {f"{name}/{local}": tensor for local, tensor in encoded.items()}
            size += sum(tensor.nbytes for tensor in encoded.values())
        schemes = {name: codec.scheme(state) for name, _, state in contents.layers}
        metadata = {**header, "codec": codec.name, "schemes": json.dumps(schemes)}
        save_file(tensors, folder / "model.drawer", metadata=metadata)
        return Written({}, size)

    def read(self, folder, layers=None):
        header = self.header(folder / "model.drawer")
        codec = formats.available()[header["codec"]]()
        tensors = load_file(folder / "model.drawer")
        for name, scheme in json.loads(header["schemes"]).items():
            locals_ = {key: tensors.get(f"{name}/{key}") for key in codec.tensors}
            present = {key: tensor for key, tensor in locals_.items() if tensor is not None}
            yield name, codec.decode(present, scheme)

    def plain(self, folder):
        tensors = load_file(folder / "model.drawer")
        encoded = {f"{key.split('/')[0]}.weight" for key in tensors} - {"plain.weight"}
        plain = {
            key.removeprefix("plain/"): tensor
            for key, tensor in tensors.items()
            if key.startswith("plain/")
        }
        return plain, encoded

    def header(self, file):
        return formats.container("dense").header(file)


class Signs(Codec):
    """One byte a weight: its sign, times the one magnitude that a layer has."""

    name = "signs"
    summary = "one magnitude for each layer"
    container = "drawer"
    tensors = ("signs", "magnitude")
    stock = False

    def why_not(self, target, state):
        return None if len(state.weight) > 1 else "it has one row"

    def encodes(self, state):
        return True

    def scheme(self, state):
        return {"magnitudes": 1}

    def encode(self, state):
        return {
            "signs": state.weight.sign().to(torch.int8),
            "magnitude": state.weight.abs().amax().reshape(1),
        }

    def decode(self, tensors, scheme):
        return LayerState(tensors["signs"] * tensors["magnitude"])


@pytest.fixture
def installed(monkeypatch):
    """The two classes, as entry points of a package that is installed."""
    points = {"optimum_order.formats": Signs, "optimum_order.containers": Drawer}

    class Point:
        def __init__(self, cls):
            self.name = cls.name
            self.load = lambda: cls

    def entry_points(group):
        return [Point(points[group])] if group in points else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    for cached in (formats.available, formats.containers):
        cached.cache_clear()
    yield points
    monkeypatch.undo()
    for cached in (formats.available, formats.containers):
        cached.cache_clear()


def test_a_new_codec_and_a_new_container_are_one_file(installed, tiny_llama_folder, tmp_path):
    assert isinstance(formats.container("signs"), Drawer)
    compressed = JointCompressor.from_pretrained(tiny_llama_folder).compress(
        "magnitude:0.5", progress=False
    )
    for target in compressed._targets.values():  # a model that the codec holds
        weight = compressed.layers[target.name].weight
        target.write(weight.sign() * 0.25)
        state = LayerState(weight.sign() * 0.25, pruned=weight == 0)
        compressed.layers[target.name] = state
    assert compressed.save_pretrained(tmp_path / "out", format="signs") == "signs"
    assert verify(tmp_path / "out") == []
    facts = manifest.load(tmp_path / "out")
    assert "model.drawer" in facts["files"] and "model.safetensors" not in facts["files"]
    assert facts["bytes"]["after"] == (tmp_path / "out" / "model.drawer").stat().st_size
    assert facts["bytes"]["per_weight_bits"] == pytest.approx(8, abs=0.1)
    assert "*.drawer" in hub.patterns()

    convert(tmp_path / "out", tmp_path / "dense", "dense")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, tensor in compressed.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    convert(tmp_path / "dense", tmp_path / "again", "signs")
    assert verify(tmp_path / "again") == []

    data = bytearray((tmp_path / "out" / "model.drawer").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "model.drawer").write_bytes(bytes(data))
    assert verify(tmp_path / "out") == [
        "model.drawer was changed after it was written: its sha256 does not match."
    ]


def test_a_container_that_is_not_installed_is_named(installed):
    del installed["optimum_order.containers"]
    formats.containers.cache_clear()
    with pytest.raises(ArtifactError, match="needs the container 'drawer', which is not installed"):
        formats.container("signs")
