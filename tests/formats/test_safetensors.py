"""What was measured is what loads: stock transformers reloads every artifact in a fresh process.

That process has not imported this package, except for those formats of which that is asked.
"""

import copy
import json
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from optimum_order import formats
from optimum_order.errors import ArtifactError, InvariantError
from optimum_order.files import weight_bytes
from optimum_order.formats import Contents, Layers
from optimum_order.formats.layout import blocks
from optimum_order.formats.older import with_older_keys
from optimum_order.formats.safetensors import Safetensors
from optimum_order.models.source import Checkpoint
from optimum_order.models.units import find_units
from optimum_order.testing import same_bits

CONTAINER = Safetensors()
SCRIPT = Path(__file__).parents[1] / "reload_stock.py"
IMPORT_FIRST = """
import sys, {module}
sys.path.insert(0, sys.argv[1])
import reload_stock
reload_stock.main(sys.argv[2], sys.argv[3:])
"""
INPUTS = torch.arange(1, 25).view(2, 12) % 61
TINY = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
GPT2 = {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS = {
    "llama": TINY | HEADS | {"intermediate_size": 128, "attention_bias": True},
    "qwen3": TINY | HEADS | {"intermediate_size": 128, "tie_word_embeddings": True},
    "gemma": TINY | HEADS | {"intermediate_size": 128},
    "opt": TINY | {"ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    "gpt_neox": TINY | {"intermediate_size": 128, "num_attention_heads": 4},
    "gpt2": GPT2,
    "mixtral": TINY | HEADS | EXPERTS | {"intermediate_size": 32},
    "qwen3_moe": TINY | HEADS | EXPERTS | {"intermediate_size": 128},
    "gpt_oss": TINY | HEADS | EXPERTS | {"intermediate_size": 64},
    "bert": TINY | {"intermediate_size": 128, "num_attention_heads": 4},
}
MIXED = [
    f"magnitude:0.4 > rtn(bits={b}, group_size={g})"
    for b, g in zip(range(2, 9), [-1, 32, 64, 16] * 2, strict=False)
]
ATTENTION = "*attn*"


@dataclass(frozen=True)
class Case:
    """One artifact: the orders are dealt to the layers in turn; experts all get the last one."""

    model: str
    dtype: str
    format: str
    orders: tuple[str, ...]
    targets: str | None = None
    shard: str = "5GB"


NF4, INT8 = "magnitude:0.5 > bitsandbytes:nf4", "magnitude:0.5 > bitsandbytes:int8"
DOUBLE = "bitsandbytes(dtype=nf4, double_quant=true) > magnitude:0.3"
FP4 = "bitsandbytes(dtype=fp4, blocksize=32) > magnitude:0.4"
RTN4 = "rtn(bits=4, group_size=32) > magnitude:0.5"
N_OF_M = "magnitude(sparsity=0.5, pattern=2:4) > rtn:4"
AFFINE = "magnitude:0.6 > rtn(bits=3, group_size=16, symmetric=false)"
OFF_GRID = "rtn:4 > magnitude(sparsity=0.5, off_grid=true)"
W8A8 = "magnitude:0.5 > rtn(bits=8, group_size=-1) > activations:8"
W4A8 = "activations:8 > rtn(bits=4, group_size=32) > magnitude:0.4"
W8A8_STATIC = "rtn(bits=8, group_size=-1) > activations(bits=8, per=tensor)"
FP8 = "magnitude:0.5 > rtn:fp8 > activations:fp8"
FP8_STATIC = "rtn:fp8 > activations(bits=fp8, per=tensor)"
ROUNDED = [W8A8, W4A8, "magnitude:0.5", W8A8_STATIC, FP8, RTN4, FP8_STATIC, "rtn:fp8"]
CASES = [
    Case("llama", "bfloat16", "dense", ("magnitude:0.5",)),
    Case("gpt2", "float16", "dense", ("magnitude:0.5", NF4), shard="40KB"),
    Case("mixtral", "float32", "dense", ("magnitude:0.5", RTN4)),
    Case("qwen3_moe", "bfloat16", "dense", (RTN4,)),
    Case("gpt_oss", "bfloat16", "dense", (RTN4,)),
    *(
        Case("llama", dtype, "compressed-tensors", tuple(MIXED))
        for dtype in ("float32", "bfloat16", "float16")
    ),
    Case("qwen3", "bfloat16", "compressed-tensors", (RTN4,), shard="20KB"),
    Case("gemma", "bfloat16", "compressed-tensors", tuple(MIXED)),
    Case("opt", "float16", "compressed-tensors", tuple(MIXED)),
    Case("gpt_neox", "float32", "compressed-tensors", (RTN4, "magnitude:0.5")),
    Case("bert", "float32", "compressed-tensors", tuple(MIXED)),
    Case("llama", "bfloat16", "compressed-tensors", tuple(MIXED), targets="*1.mlp*"),
    Case("mixtral", "bfloat16", "compressed-tensors", (*MIXED, RTN4)),
    Case("mixtral", "float32", "compressed-tensors", (RTN4,), targets="*experts*"),
    Case("qwen3_moe", "float16", "compressed-tensors", (RTN4,), shard="20KB"),
    Case(
        "qwen3_moe",
        "float32",
        "compressed-tensors",
        (*MIXED, "magnitude:0.5 > rtn(bits=3, group_size=-1)"),
    ),
    Case("gpt_oss", "bfloat16", "compressed-tensors", (RTN4,), targets=ATTENTION),
    *(
        Case("llama", dtype, "compressed-tensors", orders)
        for dtype in ("float32", "bfloat16", "float16")
        for orders in ((W8A8,), (FP8,), tuple(ROUNDED))
    ),
    Case("llama", "bfloat16", "compressed-tensors", (W4A8,), shard="20KB"),
    Case("qwen3", "bfloat16", "compressed-tensors", ("rtn:fp8",)),
    Case("opt", "bfloat16", "compressed-tensors", (FP8_STATIC,), shard="20KB"),
    Case("bert", "float32", "compressed-tensors", (W4A8, W8A8_STATIC)),
    Case("mixtral", "bfloat16", "compressed-tensors", (W8A8, FP8, RTN4)),
    Case("llama", "float32", "bitsandbytes", (NF4,)),
    Case("llama", "bfloat16", "bitsandbytes", (DOUBLE,), shard="20KB"),
    Case("llama", "float16", "bitsandbytes", (FP4,)),
    Case("qwen3", "bfloat16", "bitsandbytes", (INT8,)),
    Case("gemma", "float16", "bitsandbytes", (INT8,)),
    Case("opt", "float32", "bitsandbytes", (INT8, "magnitude:0.5")),
    Case("gpt_neox", "bfloat16", "bitsandbytes", (NF4,)),
    Case("gpt2", "bfloat16", "bitsandbytes", (DOUBLE,)),
    Case("gpt2", "float32", "bitsandbytes", (INT8,)),
    Case("bert", "float32", "bitsandbytes", (FP4,)),
    Case("mixtral", "bfloat16", "bitsandbytes", (NF4,), targets=ATTENTION),
    Case("qwen3_moe", "float32", "bitsandbytes", (INT8,), targets=ATTENTION),
    *(Case("llama", dtype, "sparse", tuple(MIXED)) for dtype in ("float32", "bfloat16", "float16")),
    Case(
        "llama",
        "bfloat16",
        "sparse",
        (N_OF_M, "magnitude:0.5", AFFINE, OFF_GRID, RTN4),
        shard="20KB",
    ),
    Case("llama", "float32", "sparse", (RTN4,), targets="*1.mlp*"),
    Case("qwen3", "bfloat16", "sparse", (AFFINE,), shard="20KB"),
    Case("gemma", "float16", "sparse", ("magnitude:0.7",)),
    Case("opt", "float32", "sparse", (N_OF_M, "rtn(bits=2, group_size=32)")),
    Case("gpt_neox", "bfloat16", "sparse", (RTN4, OFF_GRID)),
    Case("gpt2", "bfloat16", "sparse", (AFFINE, "magnitude:0.5", N_OF_M)),
    Case("gpt2", "float32", "sparse", (RTN4,), shard="40KB"),
    Case("bert", "float32", "sparse", tuple(MIXED)),
    Case("mixtral", "bfloat16", "sparse", (*MIXED, AFFINE)),
    Case("mixtral", "float32", "sparse", (N_OF_M,), targets="*experts*", shard="20KB"),
    Case("mixtral", "float16", "sparse", (OFF_GRID,), targets=r"re:.*experts.*[02]"),
    Case("qwen3_moe", "bfloat16", "sparse", (*MIXED, RTN4), shard="20KB"),
    Case("gpt_oss", "bfloat16", "sparse", (AFFINE,), targets=ATTENTION),
]


FORMATS = sorted({case.format for case in CASES})


def build(name, dtype):
    """A tiny model with random weights, some of its inputs and outputs of unusual size."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **CONFIGS[name])
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=getattr(torch, dtype)).eval()
    for parameter in model.parameters():  # no bias or norm stays at its default
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def write(contents, folder, format="auto", **options):
    """Write a folder in a format; what was written, with an empty header by default."""
    codec = formats.choose(contents, format, unproven=True)  # these tests are the proof
    return CONTAINER.write(contents, codec, folder, **{"header": {}} | options)


@dataclass(frozen=True)
class Saved:
    """A case that was saved, and what stock transformers made of it."""

    case: Case
    contents: Contents
    folder: Path
    stored: dict
    loaded: dict

    @property
    def states(self):
        return self.contents.layers.states


@pytest.fixture(scope="module")
def saved(compressed, tmp_path_factory):
    """Every case, in the order of the cases."""
    root = tmp_path_factory.mktemp("artifacts")
    made = []
    for index, case in enumerate(CASES):
        model = build(case.model, case.dtype)
        contents = compressed(model, case.orders, case.targets and [case.targets])
        folder = root / f"artifact{index}"
        options = {"header": {"order": case.orders[0]}, "max_shard_size": case.shard}
        written = write(contents, folder, case.format, **options)
        made.append((case, contents, folder, written.stored))
    loaded = {}
    for module in (None, "optimum_order"):
        folders = [
            folder
            for case, _, folder, _ in made
            if formats.available()[case.format].import_first == module
        ]
        results = root / f"results-{module}"
        results.mkdir()
        command = [SCRIPT]
        if module is not None:
            command = ["-c", IMPORT_FIRST.format(module=module), SCRIPT.parent]
        subprocess.run([sys.executable, *command, results, *folders], check=True, cwd=root)
        for index, folder in enumerate(folders):
            loaded[folder] = load_file(results / f"{index}.safetensors")
    return [Saved(*item, loaded[item[2]]) for item in made]


@pytest.fixture(params=FORMATS)
def of_one_format(saved, request):
    """The cases of one format."""
    return [one for one in saved if one.case.format == request.param]


def test_stock_transformers_loads_the_same_tensors(of_one_format):
    for one in of_one_format:
        for name, parameter in one.contents.model.named_parameters():
            tensor = one.loaded[name].to(parameter.dtype)  # the library gives int8 back in float32
            layer = name.removesuffix(".weight")
            if one.case.format == "bitsandbytes" and layer in one.states:
                target = one.contents.layers.targets[layer]
                if target.kind == "conv1d" and one.states[layer].grid is not None:
                    tensor = tensor.T
            assert same_bits(tensor, parameter.detach()), (one.case, name)


def test_stock_transformers_computes_the_same(of_one_format):
    for one in of_one_format:
        with torch.no_grad():
            expected = one.contents.model(INPUTS).to_tuple()[0]
        outputs = one.loaded["outputs"]
        if one.case.format == "bitsandbytes":  # its kernels round inputs or scales
            error = (outputs.float() - expected.float()).norm() / expected.float().norm()
            assert error < 0.05, one.case
        else:
            assert same_bits(outputs, expected), one.case


def test_read_gives_the_layers_back(of_one_format):
    for one in of_one_format:
        wanted = {name: one.stored.get(name) for name in one.states}
        read = dict(CONTAINER.read(one.folder, wanted))
        assert list(read) == list(one.states)
        for name, state in read.items():
            expected = one.states[name]
            assert same_bits(state.weight, expected.weight), (one.case, name)
            if one.case.format == "dense" or expected.grid is None:
                assert state.grid is None
            else:
                assert (state.grid.bits, state.grid.unit) == (
                    expected.grid.bits,
                    expected.grid.unit,
                )
                codes = state.grid.quantize(state.weight)
                assert torch.equal(codes, expected.grid.quantize(expected.weight))
            inputs = [s.inputs and (s.inputs.words, s.inputs.scale) for s in (state, expected)]
            assert inputs[0] == inputs[1], (one.case, name)
            if one.case.format == "sparse":
                assert torch.equal(state.mask, expected.mask)
            else:
                assert state.pruned is None


def test_read_lists_every_matrix_by_itself(of_one_format):
    for one in of_one_format:
        read = dict(CONTAINER.read(one.folder))
        plain = [name for name in one.states if name not in one.stored]
        assert set(plain) <= set(read)
        assert all(same_bits(read[name].weight, one.states[name].weight) for name in plain)


def test_what_is_on_disk_is_a_stock_checkpoint(of_one_format):
    for one in of_one_format:
        config = json.loads((one.folder / "config.json").read_text())
        shards = CONTAINER.files(one.folder)
        index = one.folder / "model.safetensors.index.json"
        assert not list(one.folder.glob("*.new"))
        tensors = {}
        for shard in shards:
            assert CONTAINER.header(shard) == {"order": one.case.orders[0], "format": "pt"}
            tensors |= {key: (tensor, shard.name) for key, tensor in load_file(shard).items()}
        if one.case.shard == "5GB":
            assert [shard.name for shard in shards] == ["model.safetensors"] and not index.exists()
        else:
            content = json.loads(index.read_text())
            assert len(shards) > 1
            assert content["weight_map"] == {key: shard for key, (_, shard) in tensors.items()}
            size = sum(tensor.nbytes for tensor, _ in tensors.values())
            assert content["metadata"]["total_size"] == size
        assert weight_bytes(one.folder) == sum(shard.stat().st_size for shard in shards)
        assert ("quantization_config" in config) == (one.case.format != "dense")
        entry = config.get("quantization_config", {})
        if one.case.format == "compressed-tensors":
            packed = entry["format"] == "pack-quantized" and len(entry["config_groups"]) == 1
            ours = {"version", "dequantize"} if packed else {"version"}
            assert set(entry) - set(QuantizationConfig.model_fields) == ours
            assert ("lm_head" in entry["ignore"]) == hasattr(one.contents.model, "lm_head")
        if one.case.format == "bitsandbytes":
            assert set(entry) <= set(transformers.BitsAndBytesConfig().to_dict())


@pytest.mark.parametrize("architecture", ["resnet", "regnet"])
def test_convolutions_are_written_and_read_as_matrices(
    make_image_model, compressed, architecture, tmp_path
):
    model = make_image_model(architecture)
    contents = compressed(model, "magnitude:0.5 > rtn(bits=4, group_size=-1)")
    states = contents.layers.states
    for shard in ("5GB", "4KB"):
        stored = write(contents, tmp_path, max_shard_size=shard).stored
        read = dict(CONTAINER.read(tmp_path, {name: stored.get(name) for name in states}))
        assert list(read) == list(states)
        assert all(same_bits(read[name].weight, state.weight) for name, state in states.items())
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
        expected = model.state_dict()
        for name, tensor in loaded.state_dict().items():
            assert same_bits(tensor, expected[name])
    changed = contents.layers.targets[next(iter(states))].parameter
    changed.data.view(-1)[0] += 1
    with pytest.raises(InvariantError, match="does not hold the weight that layer"):
        write(contents, tmp_path)


def test_a_shorter_checkpoint_leaves_no_old_shards(compressed, tmp_path):
    contents = compressed(build("llama", "float32"), RTN4)
    write(contents, tmp_path, "compressed-tensors", max_shard_size="20KB")
    assert len(CONTAINER.files(tmp_path)) > 1
    write(contents, tmp_path, "dense")
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    # embeddings and head
    assert len(dict(CONTAINER.read(tmp_path))) == len(contents.layers.states) + 2


def test_a_model_that_does_not_hold_its_layers_is_refused(compressed, tmp_path):
    contents = compressed(build("llama", "float32"), RTN4)
    contents.model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
    pattern = r"does not hold the weight that layer 'model.layers.1.mlp.up_proj' has"
    with pytest.raises(InvariantError, match=pattern):
        write(contents, tmp_path)


def test_each_layer_is_encoded_once_and_no_weight_is_compared_with_itself(
    compressed, monkeypatch, tmp_path
):
    contents = compressed(build("llama", "float32"), RTN4)
    shared = {
        name: type(state)(contents.layers.targets[name].shared(), state.pruned, state.grid)
        for name, state in contents.layers.states.items()
    }
    contents = Contents(contents.model, Layers(contents.layers.targets, shared))
    codec = formats.choose(contents)
    encoded = []
    original = codec.encode
    codec.encode = lambda state: encoded.append(state) or original(state)
    compare = torch.equal

    def equal(one, other):
        assert one.data_ptr() != other.data_ptr()
        return compare(one, other)

    monkeypatch.setattr(torch, "equal", equal)
    CONTAINER.write(contents, codec, tmp_path, header={})
    assert [id(state) for state in encoded] == [id(state) for state in shared.values()]


def test_evaluating_with_the_librarys_modules_does_not_change_what_is_saved(saved, tmp_path):
    """On some CPUs the first forward pass repacks the weights in place; ours are not those."""
    one = saved[CASES.index(Case("llama", "float32", "bitsandbytes", (NF4,)))]
    runs = transformers.AutoModelForCausalLM.from_pretrained(one.folder, device_map="cpu")
    with torch.no_grad():
        runs(INPUTS)
    write(one.contents, tmp_path, "bitsandbytes", header={"order": NF4})
    before, after = (load_file(folder / "model.safetensors") for folder in (one.folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)


@pytest.fixture
def packed(compressed, tmp_path):
    """A small artifact to damage."""
    write(compressed(build("llama", "float32"), RTN4), tmp_path, max_shard_size="20KB")
    return tmp_path


def test_no_path_out_of_the_folder_is_followed(packed):
    file = packed / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for path in [
        "../elsewhere.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "model.bin",
    ]:
        index["weight_map"]["lm_head.weight"] = path
        file.write_text(json.dumps(index))
        with pytest.raises(ArtifactError, match=r"which is not a \.safetensors .*beside it"):
            dict(CONTAINER.read(packed))
        with pytest.raises(ArtifactError, match=r"which is not a \.safetensors .*beside it"):
            weight_bytes(packed)


def test_damaged_folders_are_errors_that_say_what_is_wrong(packed):
    shard = CONTAINER.files(packed)[0]
    content = shard.read_bytes()

    def fails(match, layers=None):
        with pytest.raises(ArtifactError, match=match):
            dict(CONTAINER.read(packed, layers))

    shard.write_bytes(content[: len(content) // 2])
    fails("cannot be read")
    with pytest.raises(ArtifactError, match="cannot be read"):
        CONTAINER.header(shard)
    shard.unlink()
    fails("is missing")
    shard.write_bytes(content)
    fails("Layer 'model.layers.7' in .*: there is no such tensor", {"model.layers.7": None})
    for rows in ([], [["a"]], [["a", "0", 1]], {}, [["lm_head.weight", 0]]):
        fails("the list of its rows cannot be read", {"x": {"rows": rows, "transposed": False}})
    for text in ("[]", "{", '"x"', "\xff", "[" * 100_000):
        (packed / "config.json").write_text(text, encoding="latin-1")
        fails("config.json")
    names = "bitsandbytes, coded, compressed-tensors, dense, gguf, gptq, sparse"
    for entry in (3, {}, {"quant_method": "awq"}, {"quant_method": []}):
        (packed / "config.json").write_text(json.dumps({"quantization_config": entry}))
        fails(f"names the quantization .* none of {names}")
    entry = {"quant_method": "bitsandbytes"}
    (packed / "config.json").write_text(json.dumps({"quantization_config": entry}))
    fails("there is no such tensor", {"model.layers.0.mlp.up_proj": None})
    (packed / "config.json").unlink()
    fails("cannot be read")


def test_parts_on_different_grids_make_no_layer(compressed, tmp_path):
    """An expert is stored in two tensors; somebody could list tensors of other experts for it."""
    contents = compressed(build("mixtral", "float32"), [*MIXED[:2], RTN4], ["*experts*"])
    written = write(contents, tmp_path, "sparse")
    name = "model.layers.0.mlp.experts.gate_up_proj.0"
    rows = written.stored[name]["rows"]
    for key, reason in [
        (rows[0][0].replace("w1", "w2"), "of different widths"),
        ("lm_head.weight", "on different grids"),
    ]:
        mixed = {"rows": [rows[0], [key, 0, 32]], "transposed": False}
        with pytest.raises(ArtifactError, match=reason):
            dict(CONTAINER.read(tmp_path, {name: mixed}))


def test_a_tensor_in_two_shards_is_an_error(packed):
    one, other = CONTAINER.files(packed)[:2]
    save_file(load_file(one), other)
    with pytest.raises(ArtifactError, match="twice"):
        dict(CONTAINER.read(packed))


# As stock transformers saves, and a block at a time


def stored_in(folder):
    files = CONTAINER.files(folder)
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def check_stock(model, folder):
    """Without any layer, what is written is what `save_pretrained` writes."""
    model.save_pretrained(folder / "stock", max_shard_size="20KB")
    contents = Contents(model, Layers({}, {}))
    written = write(contents, folder / "ours", "dense", max_shard_size="20KB")
    assert written.stored == {} and written.bytes == 0
    stock = stored_in(folder / "stock")
    ours = stored_in(folder / "ours")
    assert stock and stock.keys() == ours.keys()
    assert all(same_bits(ours[key], tensor) for key, tensor in stock.items())
    names, others = (
        sorted(file.name for file in (folder / which).iterdir() if file.suffix != ".safetensors")
        for which in ("stock", "ours")
    )
    assert "config.json" in names and names == others
    for name in names:
        one, other = (
            json.loads((folder / which / name).read_text()) for which in ("stock", "ours")
        )
        if name == "config.json":
            one = with_older_keys(one, model.config)
        if name == "model.safetensors.index.json":
            assert one["metadata"] == other["metadata"]
            assert one["weight_map"].keys() == other["weight_map"].keys()
        else:
            assert one == other, name


def test_what_is_written_is_what_stock_transformers_would_save(
    make_model, make_image_model, tmp_path
):
    for name in CONFIGS:
        check_stock(build(name, "bfloat16"), tmp_path / name)
    for name in ("albert", "gemma3_text"):
        check_stock(make_model(name), tmp_path / name)
    for name in ("convnext", "regnet", "swin", "vit"):
        check_stock(make_image_model(name), tmp_path / name)


def test_weights_that_are_tied_after_loading_are_stored_once(tmp_path):
    model = build("llama", "float32")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    check_stock(model, tmp_path)
    assert "lm_head.weight" not in stored_in(tmp_path / "ours")


class Fresh(Mapping):
    """Values that are copied on demand, and the most bytes of copies that ever lived at once."""

    def __init__(self, values, weight=lambda value: value):
        self.values_ = values
        self.weight = weight
        self.alive = 0
        self.most = 0

    def __getitem__(self, name):
        value = copy.deepcopy(self.values_[name])
        size = self.weight(value).nbytes
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(self.weight(value), self._gone, size)
        return value

    def _gone(self, size):
        self.alive -= size

    def __iter__(self):
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


AT_A_TIME = [
    Case("llama", "bfloat16", "dense", ("magnitude:0.5",)),
    Case("mixtral", "float32", "dense", ("magnitude:0.5", RTN4)),
    Case("gpt_oss", "bfloat16", "dense", (RTN4,)),
    Case("gemma", "bfloat16", "compressed-tensors", tuple(MIXED)),
    Case("qwen3", "bfloat16", "compressed-tensors", (RTN4,)),
    Case("mixtral", "bfloat16", "compressed-tensors", (*MIXED, RTN4)),
    Case("gpt2", "bfloat16", "bitsandbytes", (DOUBLE,)),
    Case("opt", "float32", "bitsandbytes", (INT8, "magnitude:0.5")),
    Case("bert", "float32", "bitsandbytes", (FP4,)),
    Case("llama", "bfloat16", "gptq", (RTN4, "magnitude:0.5")),
    Case("gpt_neox", "bfloat16", "sparse", (RTN4, OFF_GRID)),
    Case("gpt2", "bfloat16", "sparse", (AFFINE, "magnitude:0.5", N_OF_M)),
    Case("mixtral", "bfloat16", "sparse", (*MIXED, AFFINE)),
    Case("qwen3_moe", "bfloat16", "sparse", (*MIXED, RTN4)),
]


@pytest.mark.parametrize("format", sorted({case.format for case in AT_A_TIME}))
def test_a_block_at_a_time_the_same_is_written(compressed, format, tmp_path):
    for index, case in enumerate(case for case in AT_A_TIME if case.format == format):
        check_at_a_time(case, compressed, tmp_path / str(index))


def check_at_a_time(case, compressed, folder):
    model = build(case.model, case.dtype)
    model.save_pretrained(folder / "source", max_shard_size="30KB")
    contents = compressed(type(model).from_pretrained(folder / "source"), case.orders)
    options = {"revision": None, "token": None, "dtype": "auto", "trust_remote_code": False}
    weights = Checkpoint(folder / "source", **options).load_empty()
    units = find_units(weights.model)
    targets = {target.name: target for unit in units for target in unit.targets}
    states = Fresh(contents.layers.states, lambda state: state.weight)
    tensors = Fresh(dict(weights.overlaid(targets, states)))
    states.most = 0
    lazy = Contents(weights.model, Layers(targets, states), tensors)

    assert formats.choose(lazy, case.format).name == case.format
    assert formats.choose(lazy).name == formats.choose(contents).name
    # one, and the next
    sizes = {name: state.weight.nbytes for name, state in contents.layers.states.items()}
    assert states.most <= 2 * max(sizes.values())
    tensors.most = 0
    one = write(contents, folder / "one", case.format)
    other = write(lazy, folder / "other", case.format)
    assert one == other
    expected = stored_in(folder / "one")
    stored = stored_in(folder / "other")
    assert expected.keys() == stored.keys()
    assert all(same_bits(stored[key], tensor) for key, tensor in expected.items())
    for name in ("config.json", "generation_config.json"):
        files = [folder / which / name for which in ("one", "other")]
        assert [file.exists() for file in files] in ([True, True], [False, False])
        assert not files[0].exists() or files[0].read_text() == files[1].read_text()
    assert case.format != "dense" or len(CONTAINER.files(folder / "other")) > 1
    # a block that is read, a file that is filled with another, and the last tensor of the block
    # before
    by_block = [[tensors.values_[name].nbytes for name in block] for block in blocks(tensors)]
    assert tensors.most <= 2 * max(map(sum, by_block)) + max(map(max, by_block))
    in_parameter = Counter()
    for name, size in sizes.items():
        in_parameter[targets[name].parameter_name] += size
    assert states.most <= 2 * max(in_parameter.values())
    assert all(parameter.is_meta for parameter in weights.model.parameters())


def test_equal_models_are_written_byte_for_byte_alike(make_model, tmp_path):
    """Eight times, since by chance a header of two entries is the same in every other file."""
    contents = Contents(make_model("llama"), Layers({}, {}))
    written = set()
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(contents, folder, "dense", header={"a": "1", "z": "2"})
        written.add((folder / "model.safetensors").read_bytes())
        header = CONTAINER.header(folder / "model.safetensors")
        assert header == {"a": "1", "format": "pt", "z": "2"}
    assert len(written) == 1
