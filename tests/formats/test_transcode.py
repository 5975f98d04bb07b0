"""A coded model becomes one of a stock format, and computes the same bits."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from optimum_order import JointCompressor, formats
from optimum_order.artifact import manifest
from optimum_order.artifact.convert import convert
from optimum_order.artifact.verify import verify
from optimum_order.errors import FormatError
from optimum_order.formats.transcode import foreseen, home
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.uniform import UniformGrid

IDS = torch.arange(40)[None]


def model(**options):
    """Return a Llama whose heads of keys and values serve two heads of queries each."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**(sizes | heads | options), max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def coded(folder, order):
    """Compress a model and save it as coded."""
    ids = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))
    compressor = JointCompressor(model(), calibration=ids, sequence_length=32)
    compressor.compress(order, progress=False).save_pretrained(folder, format="coded")
    return folder


def states_in(folder):
    facts = manifest.load(folder)
    stored = {name: entry["stored"] for name, entry in facts["layers"].items()}
    return dict(formats.container(facts["format"]).read(folder, stored))


@pytest.fixture(scope="module", params=["ecsq:3", "wanda:0.3 > ecsq(rate=3, max_code=7)"])
def folders(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("transcode")
    source = coded(root / "coded", request.param)
    convert(source, root / "packed", "compressed-tensors")
    return source, root / "packed"


def test_values_are_equal_but_for_powers_of_two(folders):
    """Each value over its power of column and of row has the bits it had."""
    before, after = map(states_in, folders)
    assert set(before) == set(after)
    for name, state in after.items():
        grid = before[name].grid
        assert isinstance(grid, DualScaleGrid) and isinstance(state.grid, UniformGrid)
        assert state.grid.bits in (4, 8) and state.grid.group_size == -1
        codes = grid.quantize(before[name].weight)
        assert torch.equal(codes, state.grid.quantize(state.weight)), name
        rows = (state.grid.scale / grid.scale).log2()
        assert torch.equal(rows, rows.round()), name
        powers = rows.int() - grid.exponent.int()
        assert torch.equal(torch.ldexp(before[name].weight, powers), state.weight), name


def test_the_manifest_says_what_the_layers_are_now(folders):
    for folder in folders:
        assert verify(folder) == []


def test_stock_transformers_computes_the_same_bits(folders, tmp_path):
    """Each in a process of its own, the packed one without this package."""
    script = (
        "import sys, torch\n{}\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "with torch.no_grad(): logits = model(torch.arange(40)[None]).logits\n"
        "torch.save(logits, sys.argv[2])\n"
        "assert ('optimum_order' in sys.modules) == ({} != '')\n"
    )
    logits = []
    for folder, line in zip(folders, ("import optimum_order", ""), strict=True):
        file = tmp_path / f"{folder.name}.pt"
        code = script.format(line, repr(line))
        subprocess.run([sys.executable, "-c", code, folder, file], check=True)
        logits.append(torch.load(file))
    assert torch.equal(*logits)


def test_codes_of_four_bits_are_packed_in_four(tmp_path):
    source = coded(tmp_path / "coded", "ecsq(rate=3, max_code=7)")
    convert(source, tmp_path / "packed", "compressed-tensors")
    assert {state.grid.bits for state in states_in(tmp_path / "packed").values()} == {4}


def test_steps_that_have_no_place_are_refused_and_nothing_is_written(tmp_path):
    """Without sensitivities no layer looks at another, so heads of queries differ."""
    source = coded(tmp_path / "coded", "ecsq(rate=3, sensitivity=none)")
    assert states_in(source)["model.layers.1.self_attn.o_proj"].grid.exponent.any()
    with pytest.raises(FormatError, match=r"o_proj.*columns=false"):
        convert(source, tmp_path / "packed", "compressed-tensors")
    assert not (tmp_path / "packed").exists()


def test_one_step_writes_what_two_steps_write(folders, tmp_path):
    """Saved for an engine at once, with the model in memory left as it was."""
    order = manifest.load(folders[0])["order"]
    ids = torch.randint(64, (16, 32), generator=torch.Generator().manual_seed(0))
    compressor = JointCompressor(model(), calibration=ids, sequence_length=32)
    assert compressor.check_format(order, "auto", engine="transformers") == "compressed-tensors"
    compressed = compressor.compress(
        order, format="compressed-tensors", engine="transformers", progress=False
    )
    before = {name: tensor.clone() for name, tensor in compressed.model.state_dict().items()}
    written = compressed.save_pretrained(tmp_path / "once", engine="transformers")
    assert written == "compressed-tensors"
    once, twice = states_in(tmp_path / "once"), states_in(folders[1])
    for name, state in once.items():
        assert torch.equal(state.weight, twice[name].weight), name
    assert all(torch.equal(before[n], t) for n, t in compressed.model.state_dict().items())
    assert compressed.save_pretrained(tmp_path / "coded") == "coded"


def test_what_is_foreseen_is_what_comes(folders):
    """Without values: the narrowest width for each layer, one scale for each row."""
    states = states_in(folders[0])
    layers = formats.Layers(dict.fromkeys(states), states)
    contents = formats.Contents(model(), layers)
    for name, state in foreseen(contents).layers.states.items():
        grid = states_in(folders[1])[name].grid
        assert state.weight.is_meta
        assert (state.grid.bits, state.grid.group_size) == (grid.bits, grid.group_size)
    assert home(layers) == "coded"
