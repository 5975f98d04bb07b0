"""A model that is never in memory whole ends as one that was, file by file."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load_file

from optimum_order import JointCompressor
from optimum_order import compressed as compressed_module
from optimum_order.artifact.verify import verify
from optimum_order.cli import main
from optimum_order.engine import snapshot, streamed
from optimum_order.errors import ModelError, OrderError, OutputError
from optimum_order.models.lazy import Weights


@pytest.fixture
def saved(make_model, tmp_path):
    """`saved("llama")`: a compressor for a model of random weights in a folder."""

    def make(architecture, **changes):
        folder = tmp_path / "model"
        make_model(architecture, **changes).save_pretrained(folder, max_shard_size="20KB")
        ids = torch.randint(2, 60, (6, 24), generator=torch.Generator().manual_seed(0))
        return JointCompressor.from_pretrained(
            folder, calibration=ids, sequence_length=24, device="cpu"
        )

    return make


@pytest.fixture
def compress(tmp_path):
    """`compress(compressor, "rtn:4")`: one block at a time, all activations on the disk."""

    def run(compressor, order, **options):
        return compressor.compress(
            order,
            work_dir=tmp_path / "work",
            low_memory=True,
            activation_limit=0,
            progress=False,
            **options,
        )

    return run


def tensors(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_saving_reads_no_layer_while_the_c_library_keeps_memory(
    saved, compress, tmp_path, monkeypatch
):
    """What is freed after one block would be kept beside the next, for all blocks of the model."""
    active, reads = [False], []

    @contextlib.contextmanager
    def giving_back():
        active[0] = True
        yield
        active[0] = False

    def read(states, name, get=streamed.States.__getitem__):
        reads.append(active[0])
        return get(states, name)

    compressed = compress(saved("llama"), "wanda:0.5 > rtn:4")
    monkeypatch.setattr(compressed_module, "giving_memory_back", giving_back)
    monkeypatch.setattr(streamed.States, "__getitem__", read)
    compressed.save_pretrained(tmp_path / "out")
    assert all(reads) and len(reads) > 2 * len(compressed.layers)


CASES = [
    ("llama", "wanda:0.5 > gptq:4", {}),
    ("llama", "wanda:0.5 > gptq:4", {"schedule": "block"}),
    ("llama", "mixed_precision(bits=3.6, widths=[2,3,4,6], first=weaker) > magnitude:0.5", {}),
    ("llama", "gptq(bits=3, targets=*.1.mlp.*) > wanda(sparsity=0.5, targets=*.q_proj)", {}),
    ("gpt2", "magnitude:0.5 > rtn:4", {}),
    ("mixtral", "sparsegpt:0.5 > rtn:4", {}),
    ("mixtral", "magnitude:0.3 > wanda:0.5", {}),  # only masks are on the disk
    ("gpt2", "wanda:0.5", {"schedule": "block"}),
    ("llama", "activations(bits=8, per=tensor) > gptq(bits=8, group_size=-1)", {}),
    ("gemma", "gptq:4", {}),
]


@pytest.mark.parametrize(("architecture", "order", "options"), CASES)
def test_it_is_saved_as_if_it_had_been_in_memory(
    saved, compress, tmp_path, architecture, order, options
):
    compressor = saved(architecture)
    whole = compressor.compress(order, pause="block", progress=False, **options)
    part = compress(compressor, order, **options)
    manifests = []
    for compressed, name in ((whole, "whole"), (part, "part")):
        compressed.save_pretrained(tmp_path / name)
        manifest = json.loads((tmp_path / name / "optimum_order.json").read_text())
        assert manifest["pause"] == "block"
        for field in ("files", "digest", "bytes"):  # the shards may be others
            del manifest[field]
        manifests.append(manifest)
    expected = tensors(tmp_path / "whole")
    loaded = tensors(tmp_path / "part")
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)
    assert verify(tmp_path / "part") == []
    assert manifests[0] == manifests[1]
    for name, state in whole.layers.items():
        same = part.layers[name]
        assert torch.equal(state.weight, same.weight)
        assert torch.equal(state.mask, same.mask)
        assert (state.inputs and state.inputs.scale) == (same.inputs and same.inputs.scale)
    part.close()


def test_no_more_than_a_block_is_ever_filled(saved, compress, monkeypatch):
    filled = set()
    blocks = []
    materialize = Weights.materialize
    release = Weights.release

    def noted(self, names):
        names = list(names)
        materialize(self, names)
        filled.update(name for name in names if name.startswith("model.layers."))
        blocks.append({name.split(".")[2] for name in filled})

    def emptied(self, names):
        names = list(names)
        release(self, names)
        filled.difference_update(names)

    monkeypatch.setattr(Weights, "materialize", noted)
    monkeypatch.setattr(Weights, "release", emptied)
    compressed = compress(saved("llama", num_hidden_layers=4), "wanda:0.5 > gptq:4")
    assert max(map(len, blocks)) == 1
    assert set.union(*blocks) == {"0", "1", "2", "3"}
    assert filled == set()
    assert all(parameter.is_meta for parameter in compressed.model.model.layers.parameters())
    assert compressed.model.get_input_embeddings().weight.is_meta
    assert compressed.model.lm_head.weight.is_meta
    compressed.close()


def test_memory_is_given_back_whenever_a_block_is_released(saved, compress, monkeypatch):
    events = []
    release = Weights.release

    def released(self, names):
        events.append("release")
        release(self, names)

    monkeypatch.setattr(Weights, "release", released)
    monkeypatch.setattr(streamed, "trim", lambda: events.append("trim"))
    compress(saved("llama"), "rtn:4").close()
    places = [place for place, event in enumerate(events) if event == "release"]
    assert len(places) >= 2
    assert all(events[place + 1] == "trim" for place in places)


@pytest.mark.parametrize(
    "order",
    [
        "wanda:0.5 > gptq:4",
        "magnitude:0.3 > wanda:0.5",
        "activations(bits=8, per=tensor) > gptq(bits=8, group_size=-1)",
    ],
)
def test_a_run_that_is_cut_off_goes_on(saved, compress, tmp_path, monkeypatch, order):
    compressor = saved("llama", num_hidden_layers=4)
    expected = compressor.compress(order, pause="block", progress=False).layers
    save = snapshot.save
    remaining = 0

    def killed(*arguments, **options):
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise KeyboardInterrupt
        return save(*arguments, **options)

    monkeypatch.setattr(snapshot, "save", killed)
    for files in (1, 2, 3):
        remaining = files
        with pytest.raises(KeyboardInterrupt):
            compress(compressor, order, resume=(tmp_path / "work").exists())
    monkeypatch.undo()
    resumed = compress(compressor, order, resume=True)
    for name, state in expected.items():
        assert torch.equal(state.weight, resumed.layers[name].weight)
        other = resumed.layers[name].inputs
        assert (state.inputs and state.inputs.scale) == (other and other.scale)
    resumed.close()


def test_its_work_dir_is_its_own_until_it_is_closed(saved, compress):
    compressor = saved("llama")
    compressed = compress(compressor, "rtn:4")
    with pytest.raises(OutputError, match="is in use"):
        compress(compressor, "rtn:4", resume=True)
    with pytest.raises(ModelError, match="the weights are on the disk"):
        compressed.evaluate("builtin")
    compressed.close()
    compress(compressor, "rtn:4", resume=True).close()


def test_a_run_that_cannot_be_streamed_is_refused(saved, compress, make_model, tmp_path):
    with pytest.raises(OutputError, match="'low_memory' needs a 'work_dir'"):
        saved("llama").compress("rtn:4", low_memory=True)
    with pytest.raises(ModelError, match="in memory already cannot be compressed with 'low_mem"):
        compress(JointCompressor(make_model("llama")), "rtn:4")
    with pytest.raises(
        OrderError, match=r"'low_memory' pauses at blocks.* leave out pause='group'"
    ):
        compress(saved("llama"), "wanda:0.5", pause="group")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_refused(make_model, compress, tmp_path, where):
    model = make_model("llama")
    model.get_parameter(where).data.view(-1)[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    compressor = JointCompressor.from_pretrained(
        tmp_path / "model",
        calibration=torch.randint(2, 60, (2, 24)),
        sequence_length=24,
        device="cpu",
    )
    with pytest.raises(ModelError, match=f"'{where}' holds a weight that is NaN"):
        compress(compressor, "wanda:0.5")


def test_the_command_line_does_the_same(saved, tmp_path):
    saved("llama")

    def command(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["compress", *map(str, arguments)])
        return end.value.code

    order = ["--order", "magnitude:0.5 > rtn:4"]
    assert command(tmp_path / "model", tmp_path / "whole", *order) == 0
    assert command(tmp_path / "model", tmp_path / "part", *order, "--low-memory") == 0
    whole = tensors(tmp_path / "whole")
    part = tensors(tmp_path / "part")
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert not (tmp_path / "part.work").exists()
    evaluated = [*order, "--low-memory", "--evaluate", "builtin"]
    assert command("model", tmp_path / "out", *evaluated) == 2


def test_a_model_without_embeddings_is_compressed_likewise(compress):
    compressor = JointCompressor.from_pretrained("tiny-resnet", calibration_samples=8)
    order = "wanda:0.5 > rtn:4"
    expected = compressor.compress(order, pause="block", progress=False)
    compressed = compress(compressor, order)
    for name, state in expected.layers.items():
        assert torch.equal(compressed.layers[name].weight, state.weight), name
    compressed.close()
