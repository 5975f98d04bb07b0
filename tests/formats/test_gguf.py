"""A model goes into a GGUF file code for code, and comes back bit for bit, ours and transformers'."""

import contextlib
import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_order import JointCompressor, formats
from optimum_order.artifact import manifest
from optimum_order.artifact.convert import convert
from optimum_order.artifact.loading import load
from optimum_order.artifact.verify import verify
from optimum_order.errors import ArtifactError, FormatError, InvariantError, OrderError
from optimum_order.formats.gguf import FILE, GGUF
from optimum_order.formats.gguf_blocks import unpack
from optimum_order.formats.gguf_file import GGUFFile
from optimum_order.layers.grids.bitsandbytes import fit_rows
from optimum_order.layers.grids.superblock import SuperblockGrid
from optimum_order.layers.grids.superblock_search import TYPES
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.testing import CodecContract, same, same_bits

pytest.importorskip("gguf")
ROOT = Path(__file__).parents[2]
READ_BY_TRANSFORMERS = {"llama", "qwen2", "qwen3", "qwen3_moe", "gemma3", "phi3"}
"""The families whose GGUF files transformers reads, given the config that lies beside."""


def lattice(weight, pruned=None, **options):
    """A layer on a grid of float16 scales."""
    if pruned is not None:
        weight = weight.masked_fill(pruned, 0.0)
    grid = UniformGrid.fit(weight, short_scales=True, **options)
    return LayerState(grid.nearest(weight), pruned=pruned, grid=grid)


def superblocks(weight, kind, pruned=None):
    """A layer on the grid of a K-quant."""
    if pruned is not None:
        weight = weight.masked_fill(pruned, 0.0)
    grid = SuperblockGrid.fit(weight, kind, zero=pruned is not None)
    return LayerState(grid.nearest(weight), pruned=pruned, grid=grid)


class TestContract(CodecContract):
    def codec(self):
        return GGUF()

    def states(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = torch.randn(5, 128).to(dtype)
            for pruned in (None, torch.rand(5, 128) < 0.5):
                for group in (32, 64, -1):
                    for bits in range(2, 9):
                        yield lattice(weight, pruned, bits=bits, group_size=group)
                    for bits in range(2, 6):
                        yield lattice(weight, pruned, bits=bits, group_size=group, symmetric=False)
            for kind in TYPES:
                for pruned in (None, torch.rand(3, 512) < 0.5):
                    yield superblocks(torch.randn(3, 512).to(dtype), kind, pruned)

    def refused(self):
        weight = torch.randn(4, 64)
        yield lattice(weight, bits=6, symmetric=False)
        yield lattice(weight, bits=4, group_size=16)
        grid, _ = fit_rows(weight)
        yield LayerState(grid.nearest(weight), grid=grid)


def test_scales_that_float16_lacks_are_refused_with_what_to_type():
    weight = torch.randn(4, 64)
    grid = UniformGrid.fit(weight, bits=4)
    reason = GGUF().why_not_values(LayerState(grid.nearest(weight), grid=grid))
    assert "scales=float16" in reason


@pytest.mark.parametrize(
    "scheme",
    [
        {},
        {"type": "Q4_9", "bits": 4, "group_size": 32, "dtype": "bfloat16"},
        {"type": "Q4_0", "bits": "4", "group_size": 32, "dtype": "bfloat16"},
        {"type": "Q4_0", "bits": 5, "group_size": 32, "dtype": "bfloat16"},
        {"type": "Q4_0", "bits": 1, "group_size": 32, "dtype": "bfloat16"},
        {"type": "Q4_0", "bits": 4, "group_size": None, "dtype": "bfloat16"},
        {"type": "Q4_0", "bits": 4, "group_size": 32, "dtype": "int8"},
    ],
)
def test_a_scheme_that_is_none_is_refused(scheme):
    data = GGUF().encode(lattice(torch.randn(2, 32).bfloat16(), bits=4))
    with pytest.raises(ArtifactError):
        GGUF().decode(data, scheme)


# Whole models


@pytest.fixture(scope="module")
def benchmark():
    """The module benchmarks/run_llama.py."""
    spec = importlib.util.spec_from_file_location("run_llama", ROOT / "benchmarks" / "run_llama.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def differing(one, other):
    """The tensors in which two models differ."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not same_bits(mine[name], theirs[name])]


@pytest.fixture(scope="module")
def families(benchmark, tmp_path_factory):
    """Every family, compressed and saved, by name: the result and its folder."""
    tokenizer = benchmark.tokenizer()
    saved = {}
    for name in benchmark.MODELS:
        compressor = JointCompressor(benchmark.build(name), processor=tokenizer)
        result = compressor.compress("rtn(bits=3, group_size=32)", format="gguf", progress=False)
        folder = tmp_path_factory.mktemp("family") / "saved"
        result.save_pretrained(folder, "gguf")
        saved[name] = result, folder
    return saved


def test_every_family_comes_back_bit_for_bit(families):
    assert len(families) >= 8
    for name, (result, folder) in families.items():
        assert str(result.order) == "rtn(bits=3, group_size=32, scales=float16)"
        assert verify(folder) == [], name
        loaded = load(folder, manifest.load(folder))
        assert differing(result.model, loaded.model) == [], name
        for layer, state in loaded.layers.states.items():
            grid = result.layers[layer].grid
            assert state.grid.bits == 3 and same_bits(state.grid.scale, grid.scale), (name, layer)


def test_transformers_reads_the_same_values(families):
    for name, (result, folder) in families.items():
        config = AutoConfig.from_pretrained(folder)
        if config.model_type.removesuffix("_text") not in READ_BY_TRANSFORMERS:
            continue
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=FILE, config=config, dtype="auto"
        )
        assert loaded.dtype == torch.bfloat16
        assert differing(result.model, loaded) == [], name


def test_codes_are_in_the_file_as_they_are(families):
    """In files of the families that interleave the rows of heads, in that order."""
    for name, place in [("llama", "attn_q"), ("qwen3", "attn_q"), ("phi3", "attn_qkv")]:
        result, folder = families[name]
        layer = next(n for n in result.layers if n.endswith(("q_proj", "qkv_proj")))
        state = result.layers[layer]
        stored, data = GGUFFile(folder / FILE).bytes_of(f"blk.0.{place}.weight")
        codes = state.grid.quantize(state.weight)
        if name == "llama":
            heads = result.model.config.num_attention_heads
            codes = codes.view(heads, 2, -1, codes.shape[1]).transpose(1, 2).reshape(codes.shape)
        assert torch.equal(unpack(data, stored.kind).codes, codes), name


def test_experts_are_stacked(families):
    _, folder = families["mixtral"]
    stored = GGUFFile(folder / FILE).tensors["blk.1.ffn_down_exps.weight"]
    assert stored.shape == (4, 128, 256) and stored.kind.name == "Q4_0"


@pytest.fixture(scope="module")
def tiny():
    return JointCompressor.from_pretrained("tiny-llama")


@pytest.mark.parametrize(
    "order",
    [
        "rtn:4",
        "magnitude:0.5 > rtn(bits=8, group_size=64)",
        "rtn(bits=4, group_size=32, symmetric=false)",
        "rtn(bits=2, targets=*.self_attn.*) > rtn(bits=5, targets=*.mlp.*)",
        "magnitude:0.5",
        "rtn(bits=q4_k, zero=true, targets=*.self_attn.*) > magnitude:0.5 > rtn(bits=q3_k, targets=*.mlp.*)",
    ],
)
def test_bytes_are_known_before_the_work(tiny, order, tmp_path):
    expected = tiny.estimate(order, format="gguf").steps[-1]
    result = tiny.compress(order, format="gguf", progress=False)
    assert result.save_pretrained(tmp_path / "out", "gguf") == "gguf"
    assert expected.exact and expected.format == "gguf"
    assert expected.bytes == (tmp_path / "out" / FILE).stat().st_size
    assert verify(tmp_path / "out") == []


def test_other_formats_of_the_same_values(tiny, tmp_path):
    result = tiny.compress("rtn(bits=5, group_size=32)", format="gguf", progress=False)
    result.save_pretrained(tmp_path / "gguf", "gguf")
    for there in ("compressed-tensors", "coded", "dense"):
        convert(tmp_path / "gguf", tmp_path / there, there)
        assert verify(tmp_path / there) == []
    convert(tmp_path / "coded", tmp_path / "again", "gguf")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "gguf" / FILE).read_bytes()


def test_a_model_larger_than_memory_is_written_alike(tiny, tmp_path):
    order = "magnitude:0.3 > rtn(bits=4, group_size=32)"
    tiny.compress(order, format="gguf", progress=False).save_pretrained(tmp_path / "a", "gguf")
    with contextlib.closing(
        tiny.compress(
            order, format="gguf", low_memory=True, work_dir=tmp_path / "work", progress=False
        )
    ) as result:
        result.save_pretrained(tmp_path / "b", "gguf")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert verify(tmp_path / "b") == []


def test_a_gguf_folder_is_where_another_run_begins(tiny, tmp_path):
    first = tiny.compress("rtn(bits=4, group_size=32)", format="gguf", progress=False)
    first.save_pretrained(tmp_path / "first", "gguf")
    again = JointCompressor.from_pretrained(tmp_path / "first")
    result = again.compress("magnitude:0.5", format="gguf", progress=False)
    result.save_pretrained(tmp_path / "second", "gguf")
    assert verify(tmp_path / "second") == []
    for name, state in result.layers.items():
        kept = ~state.mask
        assert torch.equal(state.weight[kept], first.layers[name].weight[kept])
        assert state.grid.bits == 4 and state.sparsity == 0.5


def test_k_quants_go_where_their_layers_are_known(tiny, tmp_path):
    """Chosen by themselves, read by transformers, and continued; other formats refuse them."""
    order = "rtn:q4_k"
    first = tiny.compress(order, progress=False)
    assert first.save_pretrained(tmp_path / "first") == "gguf"
    config = AutoConfig.from_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "first", gguf_file=FILE, config=config, dtype="auto"
    )
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    stored = load(tmp_path / "first", manifest.load(tmp_path / "first"))
    for name, state in first.layers.items():
        assert stored.layers.states[name].grid.kind == "q4_k"
        assert same(stored.layers.states[name].grid, state.grid), name
    again = JointCompressor.from_pretrained(tmp_path / "first")
    with pytest.raises(OrderError, match="28 of 28 layers, .* zero lies between two values"):
        again.compress("magnitude:0.5", progress=False)
    for format in ("bitsandbytes", "coded", "compressed-tensors", "gptq", "sparse"):
        with pytest.raises(FormatError, match="SuperblockGrid is not .* dense, gguf can"):
            tiny.check_format(order, format)
    assert tiny.check_format(order, "dense") == "dense"


def test_a_run_with_k_quants_is_resumed_to_the_same_file(tiny, tmp_path):
    order = "magnitude:0.3 > rtn:q4_k > magnitude:0.4"
    tiny.compress(order, format="gguf", progress=False).save_pretrained(tmp_path / "a", "gguf")
    with contextlib.closing(
        tiny.compress(
            order, format="gguf", low_memory=True, work_dir=tmp_path / "work", progress=False
        )
    ) as result:
        result.save_pretrained(tmp_path / "b", "gguf")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert verify(tmp_path / "b") == []


def test_rows_that_superblocks_do_not_divide_get_blocks(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    compressor = JointCompressor(LlamaForCausalLM(config).bfloat16())
    expected = compressor.estimate("rtn:q6_k", format="gguf").steps[-1]
    result = compressor.compress("rtn:q6_k", format="gguf", progress=False)
    result.save_pretrained(tmp_path / "out", "gguf")
    assert expected.bytes == (tmp_path / "out" / FILE).stat().st_size
    assert verify(tmp_path / "out") == []
    tensors = GGUFFile(tmp_path / "out" / FILE).tensors
    assert tensors["blk.0.ffn_down.weight"].kind.name == "Q6_K"
    assert tensors["blk.0.ffn_up.weight"].kind.name == "Q8_0"
    notes = manifest.load(tmp_path / "out")["layers"]["model.layers.0.mlp.up_proj"]["notes"]
    assert notes == ["rtn:q6_k: rows are no multiple of 256, so it has 8 bits in groups of 32"]


def test_a_coded_ecsq_model_gets_the_narrowest_blocks(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16()
    ids = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))
    compressor = JointCompressor(model, calibration=ids, sequence_length=32)
    result = compressor.compress("ecsq(rate=3, max_code=15)", progress=False)
    result.save_pretrained(tmp_path / "coded", "coded")
    convert(tmp_path / "coded", tmp_path / "gguf", engine="llama.cpp")
    assert verify(tmp_path / "gguf") == []
    file = GGUFFile(tmp_path / "gguf" / FILE)
    kinds = set()
    for name, stored in file.tensors.items():
        if name.startswith("blk.") and len(stored.shape) == 2:
            kinds.add(stored.kind.name)
            codes = unpack(file.bytes_of(name)[1], stored.kind).codes
            low, high = codes.aminmax()
            narrower = {"Q4_0": 0, "Q5_0": 8, "Q8_0": 16}[stored.kind.name]
            assert low < -narrower or high >= narrower, name
    assert kinds <= {"Q4_0", "Q5_0"}


def test_layers_of_other_inputs_stay_values_and_that_is_said(tmp_path, caplog):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    compressor = JointCompressor(LlamaForCausalLM(config).bfloat16())
    result = compressor.compress("rtn(bits=4, group_size=-1)", format="gguf", progress=False)
    with caplog.at_level(logging.WARNING):
        result.save_pretrained(tmp_path / "out", "gguf")
    assert "1 quantized layers, such as 'model.layers.0.mlp.down_proj', are stored" in caplog.text
    assert verify(tmp_path / "out") == []
    tensors = GGUFFile(tmp_path / "out" / FILE).tensors
    assert tensors["blk.0.ffn_down.weight"].kind == torch.bfloat16
    assert tensors["blk.0.ffn_up.weight"].kind.name == "Q4_0"


def test_float32_weights_get_scales_that_fit(tmp_path):
    compressor = JointCompressor.from_pretrained("tiny-llama", dtype="float32")
    plain = compressor.compress("rtn:4", progress=False)
    with pytest.raises(FormatError, match=r"scales=float16, as '--format gguf' does"):
        plain.save_pretrained(tmp_path / "refused", "gguf")
    result = compressor.compress("rtn:4", engine="llama.cpp", progress=False)
    assert str(result.order) == "rtn(bits=4, scales=float16)"
    assert result.save_pretrained(tmp_path / "out", engine="llama.cpp") == "gguf"
    assert verify(tmp_path / "out") == []
    # what the option costs: next to nothing
    error = [
        sum(((r.layers[n].weight - s.weight) ** 2).sum() for n, s in dense.items())
        for r in (plain, result)
        for dense in [compressor.compress("magnitude:0", progress=False).layers]
    ]
    assert error[1] < 1.001 * error[0]


def test_what_cannot_be_written_is_refused_before_the_work(make_model, tiny):
    with pytest.raises(FormatError, match="OPTForCausalLM is none of the architectures"):
        JointCompressor(make_model("opt")).check_format("rtn:4", "gguf")
    with pytest.raises(FormatError, match="no whole blocks of 32; use group_size=32"):
        tiny.check_format("rtn(bits=4, group_size=16)", "gguf")
    with pytest.raises(FormatError, match=r"symmetric=true"):
        tiny.check_format("rtn(bits=8, symmetric=false)", "gguf")
    assert tiny.check_format("rtn:4", "auto", engine="llama.cpp") == "gguf"


def test_a_tokenizer_without_a_name_is_refused_before_the_work(make_model):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    compressor = JointCompressor(make_model("llama"), processor=tokenizer)
    with pytest.raises(FormatError, match="of the kind WordLevel; BPE can be written"):
        compressor.check_format("rtn(bits=4, group_size=-1)", "gguf")


def test_a_model_that_holds_other_weights_is_not_written(tiny, tmp_path):
    result = tiny.compress("rtn:4", format="gguf", progress=False)
    layer = next(m for m in result.model.modules() if isinstance(m, nn.Linear))
    layer.weight = nn.Parameter(layer.weight + 1)
    with pytest.raises(InvariantError, match="does not hold the weight"):
        result.save_pretrained(tmp_path / "out", "gguf")


# Folders that nobody has checked


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "out"
    result = tiny.compress("rtn:4", format="gguf", progress=False)
    result.save_pretrained(folder, "gguf")
    return folder


def test_the_folder_has_what_every_folder_has(saved):
    names = {file.name for file in saved.iterdir()}
    assert names >= {FILE, "config.json", "tokenizer.json", "optimum_order.json"}
    assert not any(name.endswith(".safetensors") for name in names)
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    container = formats.container("gguf")
    assert container.header(saved / FILE)["optimum_order"] == "rtn(bits=4, scales=float16)"


def test_matrices_are_read_without_a_list(saved):
    states = dict(formats.container("gguf").read(saved))
    facts = manifest.load(saved)["layers"]
    assert set(states) == {*facts, "model.embed_tokens"}
    assert states["model.layers.0.mlp.up_proj"].grid.bits == 4


@pytest.mark.parametrize(
    "stored",
    [
        None,
        {},
        {"rows": []},
        {"rows": [["blk.0.attn_q.weight", 0, 256]]},
        {"rows": [["blk.0.attn_q.weight", 0, 257, 4]], "bits": 4, "group_size": 128},
        {"rows": [["blk.0.attn_q.weight", -1, 4, 4]], "bits": 4, "group_size": 128},
        {"rows": [["blk.0.attn_q.weight", 0, 256, 3]], "bits": 4, "group_size": 128},
        {"rows": [["blk.0.attn_q.weight", 0, 256, 4]], "bits": 9, "group_size": 128},
        {"rows": [["blk.0.attn_q.weight", 0, 256, 4]], "bits": 4, "group_size": 96},
        {"rows": [["blk.0.attn_q.weight", 0, 256, 4]] * 2, "bits": 4, "group_size": 128},
        {"rows": [["blk.0.attn_q.weight", 0, 1, 4], ["blk.0.ffn_down.weight", 0, 1, 0]]},
        {"rows": [["blk.9.attn_q.weight", 0, 256, 4]], "bits": 4, "group_size": 128},
    ],
)
def test_a_list_of_rows_that_is_none_is_refused(saved, stored):
    with pytest.raises(ArtifactError, match="Layer 'a'"):
        list(formats.container("gguf").read(saved, {"a": stored}))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None
)
@given(at=st.floats(0, 1), patch=st.binary(min_size=1, max_size=4))
def test_a_damaged_file_is_an_artifact_error_or_another_model(saved, tmp_path, at, patch):
    data = bytearray((saved / FILE).read_bytes())
    place = int(at**3 * (len(data) - len(patch)))  # mostly in the header
    data[place : place + len(patch)] = patch
    for name in ("config.json", "optimum_order.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    (tmp_path / FILE).write_bytes(data)
    container = formats.container("gguf")
    facts = manifest.load(saved)["layers"]
    layers = {name: facts[name]["stored"] for name in list(facts)[:2]}
    try:
        for _, state in container.read(tmp_path, layers):
            state.check("read")
        container.plain(tmp_path)
    except ArtifactError:
        pass


def test_a_folder_without_its_file_or_of_another_model(saved, tmp_path):
    container = formats.container("gguf")
    with pytest.raises(ArtifactError, match="cannot be read"):
        container.plain(tmp_path)
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / FILE).write_bytes((saved / FILE).read_bytes())
    for change, match in [
        ({"dtype": "int8"}, "data type 'int8'"),
        ({"num_hidden_layers": 5}, "no tensor 'blk.4"),
        ({"hidden_act": "relu"}, "no GGUF is written of"),
        ({"vocab_size": 17}, "no tensor 'token_embd.weight' as the model"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ArtifactError, match=match):
            container.plain(tmp_path)
