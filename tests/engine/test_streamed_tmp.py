"""A model that is never in memory whole ends as one that was, file by file."""

import json

import pytest
import torch
from safetensors.torch import load_file

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.engine import snapshot
from optimum_order.errors import ModelError, OutputError
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


def tensors(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def streamed(compressor, tmp_path, order, **options):
    return compressor.compress(
        order,
        work_dir=tmp_path / "work",
        low_memory=True,
        activation_limit=0,
        progress=False,
        **options,
    )


CASES = [
    ("llama", "wanda:0.5 > gptq:4", {"pause": "block"}),
    ("llama", "wanda:0.5 > gptq:4", {"schedule": "block", "pause": "block"}),
    ("llama", "mixed_precision(bits=3.6, widths=[2,3,4,6], first=weaker) > magnitude:0.5", {"pause": "block"}),
    ("gpt2", "magnitude:0.5 > rtn:4", {"pause": "block"}),
    ("mixtral", "sparsegpt:0.5 > rtn:4", {"pause": "block"}),
    ("mixtral", "magnitude:0.3 > wanda:0.5", {"pause": "block"}),  # of which only masks are on the disk
    ("gpt2", "wanda:0.5", {"schedule": "block", "pause": "block"}),
    ("gemma", "gptq:4", {"pause": "block"}),
]


@pytest.mark.parametrize(("architecture", "order", "options"), CASES)
def test_it_is_saved_as_if_it_had_been_in_memory(saved, tmp_path, architecture, order, options):
    compressor = saved(architecture)
    whole = compressor.compress(order, progress=False, **options)
    part = streamed(compressor, tmp_path, order, **options)
    for compressed, name in ((whole, "whole"), (part, "part")):
        compressed.save_pretrained(tmp_path / name)
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "part")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert verify(tmp_path / "part") == []
    said, other = (
        json.loads((tmp_path / name / "optimum_order.json").read_text())
        for name in ("whole", "part")
    )
    for manifest in (said, other):
        del manifest["files"], manifest["digest"], manifest["bytes"]  # it may have other shards
    assert said == other
    for name, state in whole.layers.items():
        same = part.layers[name]
        assert torch.equal(state.weight, same.weight) and torch.equal(state.mask, same.mask)
    part.close()


def test_no_more_than_a_block_is_ever_filled(saved, tmp_path, monkeypatch):
    filled, seen = set(), []
    materialize, release = Weights.materialize, Weights.release

    def noted(self, names):
        names = list(names)
        materialize(self, names)
        filled.update(name for name in names if name.startswith("model.layers."))
        seen.append({name.split(".")[2] for name in filled})

    def emptied(self, names):
        names = list(names)
        release(self, names)
        filled.difference_update(names)

    monkeypatch.setattr(Weights, "materialize", noted)
    monkeypatch.setattr(Weights, "release", emptied)
    compressed = streamed(saved("llama", num_hidden_layers=4), tmp_path, "wanda:0.5 > gptq:4")
    assert max(map(len, seen)) == 1 and set.union(*seen) == {"0", "1", "2", "3"}
    assert filled == set() and all(
        parameter.is_meta for parameter in compressed.model.model.layers.parameters()
    )
    assert (
        compressed.model.get_input_embeddings().weight.is_meta
        and compressed.model.lm_head.weight.is_meta
    )
    compressed.close()


@pytest.mark.parametrize("order", ["wanda:0.5 > gptq:4", "magnitude:0.3 > wanda:0.5"])
def test_what_was_cut_off_goes_on(saved, tmp_path, monkeypatch, order):
    compressor, save, left = saved("llama", num_hidden_layers=4), snapshot.save, 0
    expected = compressor.compress(order, progress=False).layers

    def killed(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return save(*arguments, **options)

    monkeypatch.setattr(snapshot, "save", killed)
    for files in (1, 2, 3):
        left = files
        with pytest.raises(KeyboardInterrupt):
            streamed(compressor, tmp_path, order, resume=(tmp_path / "work").exists())
    monkeypatch.undo()
    found = streamed(compressor, tmp_path, order, resume=True)
    assert all(
        torch.equal(state.weight, found.layers[name].weight) for name, state in expected.items()
    )
    found.close()


def test_its_work_dir_is_its_own_until_it_is_closed(saved, tmp_path):
    compressor = saved("llama")
    found = streamed(compressor, tmp_path, "rtn:4")
    with pytest.raises(OutputError, match="is in use"):
        streamed(compressor, tmp_path, "rtn:4", resume=True)
    with pytest.raises(ModelError, match="the weights are on the disk"):
        found.evaluate("builtin")
    found.close()
    streamed(compressor, tmp_path, "rtn:4", resume=True).close()


def test_what_it_cannot_do_is_refused(saved, make_model, tmp_path):
    with pytest.raises(OutputError, match="'low_memory' needs a 'work_dir'"):
        saved("llama").compress("rtn:4", low_memory=True)
    with pytest.raises(
        ModelError, match="in memory already cannot be compressed with 'low_memory'"
    ):
        JointCompressor(make_model("llama")).compress(
            "rtn:4", work_dir=tmp_path / "work", low_memory=True
        )


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_refused(make_model, tmp_path, where):
    model = make_model("llama")
    model.get_parameter(where).data.view(-1)[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    ids = torch.randint(2, 60, (2, 24))
    compressor = JointCompressor.from_pretrained(
        tmp_path / "model", calibration=ids, sequence_length=24, device="cpu"
    )
    with pytest.raises(ModelError, match=f"'{where}' holds a weight that is NaN"):
        streamed(compressor, tmp_path, "wanda:0.5")


def test_the_program_does_the_same(saved, tmp_path):
    from optimum_order.cli import main

    saved("llama")
    found = []
    for name, more in (("whole", []), ("part", ["--low-memory"])):
        with pytest.raises(SystemExit) as end:
            main(
                [
                    "export",
                    str(tmp_path / "model"),
                    str(tmp_path / name),
                    "--order",
                    "magnitude:0.5 > rtn:4",
                    *more,
                ]
            )
        assert end.value.code == 0
        found.append(tensors(tmp_path / name))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not (tmp_path / "part.work").exists()
    with pytest.raises(SystemExit) as end:
        main(
            [
                "export",
                "model",
                str(tmp_path / "out"),
                "--order",
                "rtn:4",
                "--low-memory",
                "--evaluate",
                "builtin",
            ]
        )
    assert end.value.code == 2


def test_a_model_without_embeddings_is_compressed_likewise(tmp_path):
    compressor = JointCompressor.from_pretrained("tiny-resnet", calibration_samples=8)
    expected = compressor.compress("wanda:0.5 > rtn:4", progress=False)
    found = compressor.compress(
        "wanda:0.5 > rtn:4", work_dir=tmp_path / "work", low_memory=True, progress=False
    )
    for name, state in expected.layers.items():
        assert torch.equal(found.layers[name].weight, state.weight), name
    found.close()
