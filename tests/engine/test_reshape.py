"""A reshaper makes layers smaller; the result is a stock model whose config says so."""

import contextlib
import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.backends.base import Cut
from optimum_order.calibration.execution import PAUSES
from optimum_order.engine.recipe import method
from optimum_order.engine.reshape import cut
from optimum_order.engine.runner import Prefixes
from optimum_order.engine.workdir import WorkDir
from optimum_order.errors import InvariantError, OrderError, OutputError
from optimum_order.layers.state import LayerState
from optimum_order.models.units import find_targets, find_units
from optimum_order.order import Order, Stage

INPUTS = torch.arange(24).view(2, 12) % 61
STOCK_INPUTS = torch.arange(1, 25).view(2, 12) % 61  # those of reload_stock.py


@pytest.fixture
def narrow(plugins):
    return method(Stage("narrow", 0.5))


@pytest.fixture
def target():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return find_targets(nn.ModuleDict({"a": nn.Linear(8, 6)}))[0]


class TestCut:
    def test_takes_rows_with_their_biases_and_columns_with_their_inputs(self, narrow, target):
        weight = target.read()
        bias = target.module.bias.clone()
        rows = torch.tensor([4, 0, 1])
        columns = torch.tensor([7, 2])
        cuts = [Cut("a", 0, rows), Cut("a", 1, columns)]
        state, record = cut(narrow, target, LayerState(weight), cuts)
        assert torch.equal(state.weight, weight[rows][:, columns])
        assert torch.equal(target.read(), state.weight)
        assert torch.equal(target.module.bias, bias[rows])
        assert (target.module.out_features, target.module.in_features) == (3, 2)
        assert target.module(torch.ones(5, 2)).shape == (5, 3)
        gone = weight.square().sum() - state.weight.square().sum()
        assert record.relative_error == pytest.approx((gone / weight.square().sum()).item())
        assert (record.stage, record.measured_on) == ("narrow:0.5", "weights")

    def test_takes_the_mask_and_the_grid_along(self, narrow, target):
        state = method(Stage("magnitude", 0.5)).apply(LayerState(target.read()))
        state = method(Stage("rtn", 4)).apply(state)
        rows = torch.tensor([5, 2])
        after, _ = cut(narrow, target, state, [Cut("a", 0, rows)])
        after.check("a")
        assert torch.equal(after.mask, state.mask[rows])
        assert torch.equal(
            after.grid.quantize(after.weight), state.grid.quantize(state.weight)[rows]
        )

    def test_that_breaks_a_grid_is_refused(self, narrow, target):
        state = method(Stage("rtn", bits=4, group_size=4)).apply(LayerState(target.read()))
        with pytest.raises(OrderError, match="breaks the grid of 'a'.* before the quantization"):
            cut(narrow, target, state, [Cut("a", 1, torch.tensor([0, 1, 2, 4, 5, 6]))])

    def test_that_does_not_fit_the_layer_is_refused(self, narrow, target):
        state = LayerState(target.read())
        for index in ([], [[0]], [6], [-1], [1, 1]):
            with pytest.raises(InvariantError, match="the cut of 'a' along axis 0 must name"):
                cut(narrow, target, state, [Cut("a", 0, torch.tensor(index, dtype=torch.int64))])
        assert target.read().shape == (6, 8)

    def test_of_another_layer_than_linear_is_refused(self, narrow):
        (target,) = find_targets(nn.ModuleDict({"a": nn.Conv2d(3, 4, 1)}))
        with pytest.raises(OrderError, match=r"only nn\.Linear and Conv1D can be, got Conv2d"):
            cut(narrow, target, LayerState(target.read()), [Cut("a", 0, torch.tensor([0]))])


class TestRun:
    @pytest.mark.parametrize("stage", ["narrow:0.5", "narrow_blindly:0.5"])
    def test_smaller_blocks_follow(self, make_model, batches, run, plugins, stage):
        for pause in PAUSES:
            model = make_model("llama")
            result = run(model, f"{stage} > wanda:0.5 > rtn:4", batches, pause=pause)
            assert model.config.intermediate_size == 24
            for unit in find_units(model):
                for target in unit.targets:
                    state = result.states[target.name]
                    state.check(target.name)
                    assert torch.equal(state.weight, target.read())
                    assert not torch.is_inference(target.parameter)
                    stages = [record.stage for record in result.records[target.name]]
                    narrowed = ".mlp." in target.name
                    assert stages == [stage] * narrowed + ["wanda:0.5", "rtn:4"]
                    if narrowed:
                        assert 24 in state.weight.shape
            with torch.no_grad():
                assert torch.isfinite(model(INPUTS).logits).all()

    def test_the_statistics_are_of_what_earlier_blocks_became(
        self, make_model, batches, run, plugins
    ):
        """The cuts are those that the norms of the inputs ask for, block after block."""
        model = make_model("llama")
        run(model, "narrow:0.5", batches)
        by_hand = make_model("llama")
        for layer in by_hand.model.layers:
            norms = 0
            inputs = []
            handle = layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, args, n=inputs: n.append(args[0].flatten(0, -2))
            )
            with torch.no_grad():
                for batch in batches:
                    by_hand(**batch)
            handle.remove()
            norms = torch.cat(inputs).square().sum(0)
            index = norms.topk(24).indices.sort().values
            for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                module = getattr(layer.mlp, part)
                module.weight = nn.Parameter(module.weight.index_select(axis, index).detach())
        with torch.no_grad():
            torch.testing.assert_close(model(INPUTS).logits, by_hand(INPUTS).logits)


@pytest.mark.parametrize("order", ["narrow:0.5", "narrow:0.5 > sparsegpt:0.5 > gptq:4"])
def test_a_saved_folder_loads_in_stock_transformers_with_equal_logits(
    make_model, plugins, tmp_path, order
):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(2, 60, (6, 24), generator=torch.Generator().manual_seed(0))
    compressor = JointCompressor(model, calibration=ids, sequence_length=24, device="cpu")
    compressed = compressor.compress(order, progress=False)
    with torch.no_grad():
        expected = compressed.model(INPUTS).logits
    compressed.save_pretrained(tmp_path / "out", format="dense")
    assert verify(tmp_path / "out") == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.intermediate_size == 24
    assert loaded.model.layers[0].mlp.down_proj.weight.shape == (32, 24)
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.intermediate_size == 48, "the model that was given is left alone"
    again = compressor.compress("rtn:4", progress=False)
    assert again.model.config.intermediate_size == 48, "so is what a later run starts from"


SMALLER = "width(ratio=0.3, multiple=8)"
CUT_OFF = [
    ("llama", f"{SMALLER} > gptq:4"),
    ("llama", f"sparsegpt:0.5 > gptq:4 > {SMALLER} > magnitude:0.6"),
    ("llama", f"magnitude:0.3 > depth:2 > {SMALLER} > rtn:4"),
    ("gpt2", f"rtn:4 > depth(skip=[1]) > {SMALLER}"),
]
BLOCKS = {"llama": {"num_hidden_layers": 5}, "gpt2": {"n_layer": 5}}


@pytest.mark.parametrize(("architecture", "order"), CUT_OFF)
def test_a_run_that_is_cut_off_anywhere_ends_as_if_it_had_not_been(
    make_model, batches, run, tmp_path, killed_after, architecture, order
):
    killed_after(10**6)

    def make():
        return make_model(architecture, **BLOCKS[architecture])

    whole = make()
    expected = run(whole, order, batches, pause="block")
    tries = 0
    for files in itertools.cycle((2, 4, 3)):
        killed_after(files)
        model = make()
        folder = tmp_path / "work"
        with (
            contextlib.suppress(killed_after.Killed),
            WorkDir(folder, {}, resume=folder.exists()) as work,
        ):
            result = run(model, order, batches, pause="block", work=work)
            break
        tries += 1
    assert tries > 1
    assert result.records == expected.records
    assert [change.describe() for change in result.changes] == [
        change.describe() for change in expected.changes
    ]
    assert result.states.keys() == expected.states.keys()
    for name, state in result.states.items():
        state.check(name)
        assert torch.equal(state.weight, expected.states[name].weight)
        assert torch.equal(state.mask, expected.states[name].mask)
        assert state.notes == expected.states[name].notes
    ends = whole.state_dict()
    assert model.state_dict().keys() == ends.keys()
    assert all(torch.equal(value, ends[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == whole.config.to_dict()


def test_orders_that_share_a_smaller_beginning_end_as_if_each_were_run_alone(
    make_compressor, tmp_path
):
    """The model that runs them is made smaller, made whole, and made smaller again."""
    compressor = make_compressor()
    orders = [
        "width(ratio=0.5, multiple=8) > rtn:4",
        "rtn:4",
        "width(ratio=0.5, multiple=8) > magnitude:0.5",
        "rtn:8 > width(ratio=0.5, multiple=8)",
    ]
    runner = compressor.runner(progress=False)
    runner.prefixes = Prefixes(tmp_path / "prefixes", 10**9)
    for text in orders:
        node = runner.run(runner.check(Order.parse(text)))
        alone = compressor.compress(text, pause="block", progress=False)
        assert {n: tuple(s.weight.shape) for n, s in alone.layers.items()} == {
            n: tuple(s.weight.shape) for n, s in node.result.states.items()
        }
        ours = alone.model.state_dict()
        assert runner.model.state_dict().keys() == ours.keys()
        for name, value in runner.model.state_dict().items():
            assert torch.equal(value, ours[name]), (text, name)
        assert runner.model.config.intermediate_size == alone.model.config.intermediate_size
    runner.reset()
    original = compressor.source.load().state_dict()
    assert all(torch.equal(v, original[n]) for n, v in runner.model.state_dict().items())


FORMATS = [
    ("width:0.2 > gptq:4", "compressed-tensors"),
    ("depth:1 > gptq:4 > width:0.2", "compressed-tensors"),
    ("heads:0.5 > width:0.1", "dense"),
    ("heads:0.5 > depth:1 > gptq(bits=4, group_size=32)", "gguf"),
    ("rtn(bits=4, group_size=32) > width:0.2", "gguf"),
    ("ecsq:3 > width:0.2", "coded"),
    ("sparsegpt:0.6 > width:0.2", "sparse"),
]


@pytest.mark.slow
def test_every_format_holds_it_in_the_bytes_that_were_estimated(tmp_path):
    """Stock transformers loads the same logits in a process that never heard of us."""
    compressor = JointCompressor.from_pretrained(
        "tiny-llama", calibration_samples=4, sequence_length=64
    )
    stock = {}
    for number, (order, format) in enumerate(FORMATS):
        folder = tmp_path / str(number)
        expected = compressor.estimate(order, format=format)
        compressed = compressor.compress(order, format=format, progress=False)
        assert compressed.save_pretrained(folder, format) == format
        assert verify(folder) == []
        written = compressed.manifest["bytes"]["after"]
        if expected.steps[-1].exact:
            assert expected.bytes == written, order
        else:
            assert expected.bytes == pytest.approx(written, rel=0.1), order
        with torch.no_grad():
            logits = compressed.model(STOCK_INPUTS).logits
            if format == "gguf":
                pytest.importorskip("gguf")
                loaded = AutoModelForCausalLM.from_pretrained(
                    folder,
                    gguf_file="model.gguf",
                    config=AutoConfig.from_pretrained(folder),
                    dtype="auto",
                )
                assert torch.equal(loaded(STOCK_INPUTS).logits, logits), order
            elif format in ("coded", "sparse"):
                loaded = AutoModelForCausalLM.from_pretrained(folder)
                assert torch.equal(loaded(STOCK_INPUTS).logits, logits), order
            else:
                stock[folder] = logits
    (tmp_path / "results").mkdir()
    script = Path(__file__).parents[1] / "reload_stock.py"
    subprocess.run([sys.executable, script, tmp_path / "results", *stock], check=True)
    for number, logits in enumerate(stock.values()):
        stored = load_file(tmp_path / "results" / f"{number}.safetensors")
        assert torch.equal(stored["outputs"], logits)


def test_a_model_that_is_read_block_by_block_is_refused(tiny_llama_folder, tmp_path):
    compressor = JointCompressor.from_pretrained(tiny_llama_folder, device="cpu")
    for order in ("depth(skip=[1])", "rtn:4 > width:0.5"):
        with pytest.raises(OutputError, match=r"in memory as a whole: leave out low_memory"):
            compressor.compress(order, low_memory=True, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()
