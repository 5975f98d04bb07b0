"""What was measured is what loads: every artifact here is reloaded by stock transformers in a fresh process.

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

from optimum_order import backends, formats
from optimum_order.errors import ArtifactError, InvariantError
from optimum_order.files import weight_bytes
from optimum_order.formats import safetensors as checkpoint
from optimum_order.formats.base import blocks
from optimum_order.layers.state import LayerState
from optimum_order.models.source import Checkpoint
from optimum_order.models.units import find_units
from optimum_order.order import Order

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

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(
        **TINY, **HEADS, intermediate_size=128, attention_bias=True
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        **TINY, **HEADS, intermediate_size=128, tie_word_embeddings=True
    ),
    "gemma": lambda: transformers.GemmaConfig(**TINY, **HEADS, intermediate_size=128),
    "opt": lambda: transformers.OPTConfig(
        **TINY, ffn_dim=128, num_attention_heads=4, word_embed_proj_dim=64
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **TINY, intermediate_size=128, num_attention_heads=4
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=61, n_embd=64, n_layer=2, n_head=4, n_positions=64
    ),
    "mixtral": lambda: transformers.MixtralConfig(**TINY, **HEADS, **EXPERTS, intermediate_size=32),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **TINY, **HEADS, **EXPERTS, intermediate_size=128
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**TINY, **HEADS, **EXPERTS, intermediate_size=64),
    "bert": lambda: transformers.BertConfig(**TINY, intermediate_size=128, num_attention_heads=4),
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


def build(name, dtype):
    """A tiny model with random weights, some of its inputs and outputs of unusual size."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=getattr(torch, dtype)).eval()
    for parameter in model.parameters():
        parameter.data.add_(
            torch.randn_like(parameter) * 0.05
        )  # no bias or norm stays at its default
    return model


def compress(model, orders, targets=None):
    """Run the orders over the model's layers and write the weights back; the layers, as formats want them."""
    layers = {}
    found = [t for unit in find_units(model, targets and [targets]) for t in unit.targets]
    for index, target in enumerate(found):
        state = LayerState(target.read())
        order = orders[-1] if target.kind == "expert" else orders[index % len(orders)]
        for stage in Order.parse(order):
            state = backends.method(stage).apply(state, where=target.name)
        target.write(state.weight)
        layers[target.name] = (target, state)
    return layers


def same(one, other):
    """Equal bit for bit: unlike torch.equal, -0.0 is not 0.0."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(bits(one), bits(other))
    )


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@dataclass(frozen=True)
class Saved:
    """A case that was saved, and what stock transformers made of it."""

    case: Case
    model: torch.nn.Module
    layers: dict
    folder: Path
    stored: dict
    loaded: dict


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("artifacts")
    made = []
    for index, case in enumerate(CASES):
        model = build(case.model, case.dtype)
        layers = compress(model, case.orders, case.targets)
        folder = root / f"artifact{index}"
        format = formats.choose(model, layers, case.format)
        header = {"order": case.orders[0]}
        written = checkpoint.write(
            model, layers, format, folder, header=header, max_shard_size=case.shard
        )
        made.append((case, model, layers, folder, written.stored))
    loaded = {}
    for module in (None, "optimum_order"):
        folders = [
            item[3] for item in made if formats.available()[item[0].format].import_first == module
        ]
        results = root / f"results-{module}"
        results.mkdir()
        command = (
            [SCRIPT]
            if module is None
            else ["-c", IMPORT_FIRST.format(module=module), SCRIPT.parent]
        )
        subprocess.run([sys.executable, *command, results, *folders], check=True, cwd=root)
        loaded |= {
            folder: load_file(results / f"{index}.safetensors")
            for index, folder in enumerate(folders)
        }
    return [Saved(*item, loaded[item[3]]) for item in made]


NAMES = [f"{c.model}-{c.dtype}-{c.format}-{i}" for i, c in enumerate(CASES)]
each = pytest.mark.parametrize("index", range(len(CASES)), ids=NAMES)


@each
def test_stock_transformers_loads_the_same_tensors(saved, index):
    one = saved[index]
    transposed = {
        f"{name}.weight" for name, (target, state) in one.layers.items() if target.kind == "conv1d"
    }
    for name, parameter in one.model.named_parameters():
        got = one.loaded[name].to(parameter.dtype)  # the library gives int8 back in float32
        if (
            one.case.format == "bitsandbytes"
            and name in transposed
            and one.layers[name[:-7]][1].grid is not None
        ):
            got = got.T
        assert same(got, parameter), name


@each
def test_stock_transformers_computes_the_same(saved, index):
    one = saved[index]
    with torch.no_grad():
        expected = one.model(INPUTS).to_tuple()[0]
    if one.case.format == "bitsandbytes":  # its kernels round inputs (int8) or scales (bfloat16)
        error = (one.loaded["outputs"].float() - expected.float()).norm() / expected.float().norm()
        assert error < 0.05
    else:
        assert same(one.loaded["outputs"], expected)


@each
def test_read_gives_the_layers_back(saved, index):
    one = saved[index]
    found = dict(checkpoint.read(one.folder, {name: one.stored.get(name) for name in one.layers}))
    assert list(found) == list(one.layers)
    for name, state in found.items():
        expected = one.layers[name][1]
        assert same(state.weight, expected.weight), name
        if one.case.format == "dense" or expected.grid is None:
            assert state.grid is None
        else:
            assert (state.grid.bits, state.grid.unit) == (expected.grid.bits, expected.grid.unit)
            assert torch.equal(
                state.grid.quantize(state.weight), expected.grid.quantize(expected.weight)
            )
        assert (
            torch.equal(state.mask, expected.mask)
            if one.case.format == "sparse"
            else state.pruned is None
        )


@each
def test_read_finds_every_matrix_by_itself(saved, index):
    one = saved[index]
    found = dict(checkpoint.read(one.folder))
    plain = [name for name in one.layers if name not in one.stored]
    assert set(plain) <= set(found)
    assert all(same(found[name].weight, one.layers[name][1].weight) for name in plain)


@each
def test_what_is_on_disk_is_a_stock_checkpoint(saved, index):
    one = saved[index]
    config = json.loads((one.folder / "config.json").read_text())
    files = sorted(file.name for file in one.folder.glob("*.safetensors*"))
    shards = [file for file in files if file.endswith(".safetensors")]
    assert not list(one.folder.glob("*.new"))
    tensors = {}
    for shard in shards:
        assert checkpoint.header(one.folder / shard) == {
            "order": one.case.orders[0],
            "format": "pt",
        }
        tensors |= dict.fromkeys(load_file(one.folder / shard), shard)
    if one.case.shard == "5GB":
        assert files == ["model.safetensors"]
    else:
        index_file = json.loads((one.folder / "model.safetensors.index.json").read_text())
        assert len(shards) > 1
        assert index_file["weight_map"] == tensors
        assert index_file["metadata"]["total_size"] == sum(
            t.nbytes for shard in shards for t in load_file(one.folder / shard).values()
        )
    assert weight_bytes(one.folder) == sum((one.folder / shard).stat().st_size for shard in shards)
    assert ("quantization_config" in config) == (one.case.format != "dense")
    if one.case.format == "compressed-tensors":
        entry = config["quantization_config"]
        assert set(entry) - {"version"} == set(QuantizationConfig.model_fields)
        assert ("lm_head" in entry["ignore"]) == hasattr(one.model, "lm_head")
    if one.case.format == "bitsandbytes":
        assert set(config["quantization_config"]) <= set(
            transformers.BitsAndBytesConfig().to_dict()
        )


@pytest.mark.parametrize("architecture", ["resnet", "regnet"])
@pytest.mark.parametrize("shard", ["5GB", "4KB"])
def test_convolutions_are_written_and_read_as_matrices(
    make_image_model, architecture, shard, tmp_path
):
    model = make_image_model(architecture)
    layers = compress(model, ["magnitude:0.5 > rtn(bits=4, group_size=-1)"])
    format = formats.choose(model, layers)
    stored = checkpoint.write(
        model, layers, format, tmp_path, header={}, max_shard_size=shard
    ).stored
    found = dict(checkpoint.read(tmp_path, {name: stored.get(name) for name in layers}))
    assert list(found) == list(layers)
    assert all(same(found[name].weight, state.weight) for name, (_, state) in layers.items())
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    expected = model.state_dict()
    assert all(same(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    changed = next(iter(layers.values()))[0].parameter
    changed.data.view(-1)[0] += 1
    with pytest.raises(InvariantError, match="does not hold the weight that layer"):
        checkpoint.write(model, layers, format, tmp_path, header={})


def test_a_shorter_checkpoint_leaves_no_old_shards(tmp_path):
    model = build("llama", "float32")
    layers = compress(model, [RTN4])
    format = formats.choose(model, layers, "compressed-tensors")
    checkpoint.write(model, layers, format, tmp_path, header={}, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    checkpoint.write(model, layers, formats.choose(model, layers, "dense"), tmp_path, header={})
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert len(dict(checkpoint.read(tmp_path))) == len(layers) + 2  # embeddings and head


def test_a_model_that_does_not_hold_its_layers_is_refused(tmp_path):
    model = build("llama", "float32")
    layers = compress(model, [RTN4])
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
    with pytest.raises(
        InvariantError,
        match=r"does not hold the weight that layer 'model.layers.1.mlp.up_proj' has",
    ):
        checkpoint.write(model, layers, formats.choose(model, layers), tmp_path, header={})


def test_evaluating_with_the_librarys_modules_does_not_change_what_is_saved(saved, tmp_path):
    """On CPUs with AVX512-bf16 the first forward pass repacks the weights in place; ours are not those."""
    one = saved[
        NAMES.index(
            "llama-float32-bitsandbytes-"
            + str(CASES.index(Case("llama", "float32", "bitsandbytes", (NF4,))))
        )
    ]
    runs = transformers.AutoModelForCausalLM.from_pretrained(one.folder, device_map="cpu")
    with torch.no_grad():
        runs(INPUTS)
    format = formats.choose(one.model, one.layers, "bitsandbytes")
    checkpoint.write(one.model, one.layers, format, tmp_path, header={"order": NF4})
    before, after = (load_file(folder / "model.safetensors") for folder in (one.folder, tmp_path))
    assert before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)


@pytest.fixture
def packed(tmp_path):
    """A small artifact to damage."""
    model = build("llama", "float32")
    layers = compress(model, [RTN4])
    checkpoint.write(
        model, layers, formats.choose(model, layers), tmp_path, header={}, max_shard_size="20KB"
    )
    return tmp_path


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "path", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "model.bin"]
)
def test_no_path_out_of_the_folder_is_followed(packed, path):
    edit(
        packed / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"lm_head.weight": path}),
    )
    with pytest.raises(ArtifactError, match=r"which is not a \.safetensors beside it"):
        dict(checkpoint.read(packed))
    with pytest.raises(ArtifactError, match=r"which is not a \.safetensors beside it"):
        weight_bytes(packed)


def test_damaged_folders_are_errors_that_say_what_is_wrong(packed):
    shard = sorted(packed.glob("*.safetensors"))[0]
    content = shard.read_bytes()

    def fails(match, layers=None):
        with pytest.raises(ArtifactError, match=match):
            dict(checkpoint.read(packed, layers))

    shard.write_bytes(content[: len(content) // 2])
    fails("cannot be read")
    with pytest.raises(ArtifactError, match="cannot be read"):
        checkpoint.header(shard)
    shard.unlink()
    fails("is missing")
    shard.write_bytes(content)
    fails("Layer 'model.layers.7' in .*: there is no such tensor", {"model.layers.7": None})
    for rows in ([], [["a"]], [["a", "0", 1]], {}, [["lm_head.weight", 0]]):
        fails("the list of its rows cannot be read", {"x": {"rows": rows, "transposed": False}})
    for text in ("[]", "{", '"x"', "\xff", "[" * 100_000):
        (packed / "config.json").write_text(text, encoding="latin-1")
        fails("config.json")
    for entry in (3, {}, {"quant_method": "awq"}, {"quant_method": []}):
        (packed / "config.json").write_text(json.dumps({"quantization_config": entry}))
        fails(
            "names the quantisation .* none of bitsandbytes, compressed-tensors, dense, gptq, sparse"
        )
    (packed / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    fails("there is no such tensor", {"model.layers.0.mlp.up_proj": None})
    (packed / "config.json").unlink()
    fails("cannot be read")


def test_a_tensor_in_two_shards_is_an_error(packed):
    one, other = sorted(packed.glob("*.safetensors"))[:2]
    save_file(load_file(one), other)
    with pytest.raises(ArtifactError, match="twice"):
        dict(checkpoint.read(packed))


# --- as stock transformers saves, and a block at a time ---------------------------------------------------------------


def stored_in(folder):
    return {
        key: t
        for file in sorted(folder.glob("*.safetensors"))
        for key, t in load_file(file).items()
    }


def check_stock(model, tmp_path):
    """Without any layer, what is written is what `save_pretrained` writes."""
    model.save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    written = checkpoint.write(
        model,
        {},
        formats.available()["dense"](),
        tmp_path / "ours",
        header={},
        max_shard_size="20KB",
    )
    assert written.stored == {} and written.bytes == 0
    stock, ours = stored_in(tmp_path / "stock"), stored_in(tmp_path / "ours")
    assert stock.keys() == ours.keys() and all(
        same(ours[key], tensor) for key, tensor in stock.items()
    )
    others = sorted(
        file.name for file in (tmp_path / "stock").glob("*") if file.suffix != ".safetensors"
    )
    assert "config.json" in others and len(stock) > 0
    assert others == sorted(
        file.name for file in (tmp_path / "ours").glob("*") if file.suffix != ".safetensors"
    )
    for name in others:
        one, other = (
            json.loads((tmp_path / which / name).read_text()) for which in ("stock", "ours")
        )
        if name == "model.safetensors.index.json":
            assert (
                one["metadata"] == other["metadata"]
                and one["weight_map"].keys() == other["weight_map"].keys()
            )
        else:
            assert one == other, name


@pytest.mark.parametrize("architecture", [*CONFIGS, "albert", "gemma3_text"])
def test_what_is_written_is_what_stock_transformers_would_save(make_model, architecture, tmp_path):
    check_stock(
        build(architecture, "bfloat16") if architecture in CONFIGS else make_model(architecture),
        tmp_path,
    )


@pytest.mark.parametrize("architecture", ["convnext", "regnet", "swin", "vit"])
def test_so_it_is_for_images(make_image_model, architecture, tmp_path):
    check_stock(make_image_model(architecture), tmp_path)


def test_weights_that_are_tied_after_loading_are_stored_once(tmp_path):
    model = build("llama", "float32")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    check_stock(model, tmp_path)
    assert "lm_head.weight" not in stored_in(tmp_path / "ours")


class Fresh(Mapping):
    """Values that are copied when they are asked for, and the most bytes of them that ever were there at once."""

    def __init__(self, values, weight=lambda value: value):
        self.values_, self.weight, self.there, self.most = values, weight, 0, 0

    def __getitem__(self, name):
        value = copy.deepcopy(self.values_[name])
        size = self.weight(value).nbytes
        self.there += size
        self.most = max(self.most, self.there)
        weakref.finalize(self.weight(value), self._gone, size)
        return value

    def _gone(self, size):
        self.there -= size

    def __iter__(self):
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


AT_A_TIME = [case for case in CASES if case.shard == "5GB" and case.dtype != "float16"] + [
    Case("llama", "bfloat16", "gptq", (RTN4, "magnitude:0.5")),
    Case("qwen3", "bfloat16", "compressed-tensors", (RTN4,)),
]


@pytest.mark.parametrize(
    "case", AT_A_TIME, ids=lambda case: f"{case.model}-{case.dtype}-{case.format}"
)
def test_a_block_at_a_time_the_same_is_written(case, tmp_path):
    model = build(case.model, case.dtype)
    model.save_pretrained(tmp_path / "source", max_shard_size="30KB")
    ordinary = type(model).from_pretrained(tmp_path / "source")
    layers = compress(ordinary, case.orders, case.targets)
    options = {"revision": None, "token": None, "dtype": "auto", "trust_remote_code": False}
    weights = Checkpoint(tmp_path / "source", **options).load_empty()
    units = find_units(weights.model, case.targets and [case.targets])
    targets = {target.name: target for unit in units for target in unit.targets}
    states = Fresh({name: state for name, (_, state) in layers.items()}, lambda state: state.weight)
    tensors = Fresh(dict(weights.overlaid(targets, states)))
    states.most = 0
    pairs = formats.Paired(targets, states)

    format = formats.choose(ordinary, layers, case.format)
    assert formats.choose(weights.model, pairs, case.format, tensors=tensors).name == case.format
    assert (
        formats.choose(weights.model, pairs, tensors=tensors).name
        == formats.choose(ordinary, layers).name
    )
    assert states.most <= 2 * max(
        state.weight.nbytes for _, state in layers.values()
    )  # one, and the next
    tensors.most = 0
    one = checkpoint.write(ordinary, layers, format, tmp_path / "one", header={"order": "x"})
    other = checkpoint.write(
        weights.model, pairs, format, tmp_path / "other", header={"order": "x"}, tensors=tensors
    )
    assert one == other
    expected, found = stored_in(tmp_path / "one"), stored_in(tmp_path / "other")
    assert expected.keys() == found.keys() and all(
        same(found[key], tensor) for key, tensor in expected.items()
    )
    for name in ("config.json", "generation_config.json"):
        texts = [(tmp_path / which / name) for which in ("one", "other")]
        assert [text.exists() for text in texts] in ([True, True], [False, False])
        assert not texts[0].exists() or texts[0].read_text() == texts[1].read_text()
    assert case.format != "dense" or len(list((tmp_path / "other").glob("*.safetensors"))) > 1
    # a block that is read, a file that is filled with another, and the last tensor of the block before
    sizes = [[tensors.values_[name].nbytes for name in block] for block in blocks(tensors)]
    assert tensors.most <= 2 * max(map(sum, sizes)) + max(map(max, sizes))
    held = Counter()
    for target, state in layers.values():
        held[target.parameter_name] += state.weight.nbytes
    assert states.most <= 2 * max(held.values())
    assert all(parameter.is_meta for parameter in weights.model.parameters())


def test_equal_models_are_written_byte_for_byte_alike(make_model, tmp_path):
    """Eight times, since by chance a header of two entries is the same in every other file."""
    model, written = make_model("llama"), set()
    for number in range(8):
        (folder := tmp_path / str(number)).mkdir()
        checkpoint.write(
            model, {}, formats.choose(model, {}, "dense"), folder, header={"a": "1", "z": "2"}
        )
        written.add((folder / "model.safetensors").read_bytes())
        assert checkpoint.header(folder / "model.safetensors") == {
            "a": "1",
            "format": "pt",
            "z": "2",
        }
    assert len(written) == 1
