"""Embeddings that are compressed are loaded by stock transformers, and refused where they are not."""

import subprocess
import sys

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.errors import FormatError, OrderError

LOAD = """
import sys, torch, optimum_order
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
weight = model.get_input_embeddings().weight
assert model.get_output_embeddings().weight is weight
torch.save(weight.detach(), sys.argv[2])
"""


@pytest.fixture(scope="module")
def compressor():
    return JointCompressor.from_pretrained(
        "tiny-llama",
        calibration="builtin",
        calibration_samples=4,
        sequence_length=64,
    )


@pytest.fixture(scope="module")
def coded(compressor):
    order = "ecsq(rate=5, targets=*embed_tokens) > ecsq:4"
    return compressor.compress(order, progress=False)


def test_a_tied_embedding_is_coded_and_loaded_in_a_fresh_process(coded, tmp_path):
    folder = tmp_path / "out"
    coded.save_pretrained(folder)
    assert verify(folder) == []
    plain = JointCompressor.from_pretrained(
        "tiny-llama", calibration="builtin", calibration_samples=4, sequence_length=64
    )
    plain.compress("ecsq:4", progress=False).save_pretrained(tmp_path / "plain")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "plain")]
    embedding = coded.model.get_input_embeddings().weight
    saved = sizes[1] - sizes[0]
    assert saved > embedding.numel() * (embedding.element_size() - 5.5 / 8)
    subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(tmp_path / "weight.pt")], check=True
    )
    assert torch.equal(torch.load(tmp_path / "weight.pt"), embedding)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_stock_formats_of_linear_layers_refuse_one(compressor, tmp_path, format):
    compressed = compressor.compress("rtn(bits=4, targets=[*, *embed_tokens])", progress=False)
    with pytest.raises(FormatError, match="'model.embed_tokens'"):
        compressed.save_pretrained(tmp_path / "out", format=format)


def test_llama_cpp_gets_one_in_eight_bits(compressor, tmp_path):
    embeddings = "rtn(bits=8, group_size=32, scales=float16, targets=*embed_tokens)"
    layers = "rtn(bits=4, group_size=32, scales=float16, targets=*.layers.*)"
    compressed = compressor.compress(f"{embeddings} > {layers}", progress=False)
    compressed.save_pretrained(tmp_path / "out", format="gguf")
    assert verify(tmp_path / "out") == []
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out/model.gguf").tensors}
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.ffn_up.weight"] == "Q4_0"
    assert "output.weight" not in types
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.bfloat16
    )
    weight = compressed.model.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, weight)
    assert torch.equal(loaded.get_output_embeddings().weight, weight)


def test_a_run_with_an_embedding_is_gone_on_with(compressor, coded, tmp_path):
    folder = tmp_path / "out"
    coded.save_pretrained(folder)
    again = JointCompressor.from_pretrained(folder)
    pruned = again.compress("magnitude(sparsity=0.3, targets=*.layers.*)", progress=False)
    name = "model.embed_tokens"
    assert torch.equal(pruned.layers[name].weight, coded.layers[name].weight)
    assert pruned.layers[name].grid is not None


def test_an_option_has_them_coded_or_rounded(tmp_path):
    sizes = {}
    for choice in ("keep", "8", "coded"):
        compressor = JointCompressor.from_pretrained(
            "tiny-llama",
            calibration="builtin",
            calibration_samples=4,
            sequence_length=64,
            embeddings=choice,
        )
        compressed = compressor.compress("ecsq:4", progress=False)
        compressed.save_pretrained(tmp_path / choice)
        assert verify(tmp_path / choice) == []
        sizes[choice] = (tmp_path / choice / "model.safetensors").stat().st_size
        assert ("model.embed_tokens" in compressed.layers) is (choice != "keep")
        order = str(compressed.provenance.recipe.order)
        assert ("targets=model.embed_tokens" in order) is (choice == "8")
        estimated = compressor.estimate("ecsq:4").bytes
        assert abs(estimated / sizes[choice] - 1) < 0.05
    assert sizes["coded"] < sizes["8"] < sizes["keep"]
    again = JointCompressor.from_pretrained(tmp_path / "coded", embeddings="coded")
    with pytest.raises(OrderError, match="has none: add one such as .ecsq:3."):
        JointCompressor.from_pretrained("tiny-llama", embeddings="coded").compress("rtn:4")
    assert "model.embed_tokens" in again.source.states
