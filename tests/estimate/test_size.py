"""The bytes of a saved model, from its shapes alone: to the byte, unless they depend on the weights."""

import pytest
import torch
from safetensors.torch import save_file

from optimum_order import JointCompressor
from optimum_order.estimate import size
from optimum_order.files import weight_bytes

EXACT = [
    ("llama", "magnitude:0.5", "auto", "dense"),
    ("llama", "rtn:3", "auto", "compressed-tensors"),
    ("llama", "rtn(bits=4, group_size=-1)", "compressed-tensors", "compressed-tensors"),
    ("llama", "rtn(bits=8, group_size=16) > magnitude:0.5", "auto", "compressed-tensors"),
    ("llama", "rtn(bits=2, group_size=16)", "gptq", "gptq"),
    ("llama", "rtn(bits=3, group_size=16, symmetric=false)", "gptq", "gptq"),
    ("llama", "bitsandbytes:int8", "auto", "bitsandbytes"),
    ("llama", "bitsandbytes(dtype=nf4, blocksize=32)", "auto", "bitsandbytes"),
    ("llama", "rtn(bits=4, symmetric=false)", "sparse", "sparse"),
    ("gpt2", "rtn(bits=4, group_size=32)", "gptq", "gptq"),
    ("gpt2", "bitsandbytes(dtype=fp4, blocksize=32)", "auto", "bitsandbytes"),
    ("mixtral", "rtn(bits=4, group_size=16)", "auto", "compressed-tensors"),
    ("gpt_oss", "magnitude:0.5", "auto", "dense"),
    ("llama", "rtn(bits=8, group_size=-1) > activations:8", "auto", "compressed-tensors"),
    ("llama", "rtn(bits=4, group_size=16) > activations:8", "auto", "compressed-tensors"),
    ("llama", "rtn:fp8 > magnitude:0.5", "auto", "compressed-tensors"),
    ("mixtral", "rtn:fp8 > activations:fp8", "auto", "compressed-tensors"),
]


def compressor(model, dtype=torch.bfloat16):
    return JointCompressor(model.to(dtype), device="cpu")


def both(shaped, order, format, folder):
    """What is estimated, and what is there once it is done."""
    said = shaped.estimate(order, format=format).steps[-1]
    chosen = shaped.compress(order, progress=False).save_pretrained(folder, format)
    assert said.format == chosen
    return said, weight_bytes(folder)


@pytest.mark.parametrize(("architecture", "order", "format", "chosen"), EXACT)
def test_to_the_byte(make_model, architecture, order, format, chosen, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96} if architecture == "llama" else {}
    sizes = {"hidden_size": 32, "intermediate_size": 32} if architecture == "mixtral" else sizes
    said, bytes_ = both(
        compressor(make_model(architecture, **sizes)), order, format, tmp_path / "out"
    )
    assert said.format == chosen
    assert said.bytes == bytes_
    assert said.exact == (chosen != "sparse")


@pytest.mark.parametrize(
    "order",
    [
        "magnitude:0.0 > rtn:4",
        "magnitude:0.5",
        "magnitude(pattern=2:4) > rtn:4",
        "magnitude:0.7 > rtn:3",
        "rtn:2 > magnitude:0.6",
    ],
)
def test_what_depends_on_the_weights_is_an_expectation(make_model, order, tmp_path):
    shaped = compressor(make_model("llama", hidden_size=128, intermediate_size=256))
    said, bytes_ = both(shaped, order, "sparse", tmp_path / "out")
    assert not said.exact
    assert said.bytes == pytest.approx(bytes_, rel=0.03)


def test_scales_of_scales_are_written_as_text(make_model, tmp_path):
    shaped = compressor(make_model("llama", hidden_size=64, intermediate_size=96))
    said, bytes_ = both(
        shaped, "bitsandbytes(dtype=nf4, blocksize=32, double_quant=true)", "auto", tmp_path / "out"
    )
    assert not said.exact
    assert said.bytes == pytest.approx(bytes_, abs=50 * 14)


def test_several_files(make_model, tmp_path, monkeypatch):
    from optimum_order.artifact import folder as artifact

    monkeypatch.setattr(size, "SHARD", "40KB")
    save = artifact.save
    monkeypatch.setattr(
        artifact,
        "save",
        lambda *args, **options: save(*args, **options | {"max_shard_size": "40KB"}),
    )
    said, bytes_ = both(
        compressor(make_model("llama", hidden_size=64)), "rtn:4", "auto", tmp_path / "out"
    )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert said.bytes == bytes_


def test_one_file(tmp_path):
    tensors = {
        "b": torch.zeros(3, 5, dtype=torch.bfloat16),
        "a": torch.zeros(7),
        "Grüße": torch.zeros(2, 2, dtype=torch.uint8),
        "e": torch.zeros((), dtype=torch.int64),
        "c": torch.zeros(0, 4, dtype=torch.float16),
        "d": torch.zeros(9, dtype=torch.int32),
    }
    metadata = {"format": "pt", "order": 'a > "b"'}
    save_file(tensors, tmp_path / "file", metadata=metadata)
    assert size._file_bytes(tensors, metadata) == (tmp_path / "file").stat().st_size


def test_a_model_in_memory_is_not_copied_and_not_touched(make_model):
    shaped = compressor(make_model("llama"))
    before = {name: tensor.clone() for name, tensor in shaped.source.model.state_dict().items()}
    meta = size.empty(shaped.source)
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])
    assert {name: tensor.shape for name, tensor in meta.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in shaped.source.model.state_dict().items()
    )
    assert meta.lm_head.weight is not meta.model.embed_tokens.weight
