"""A GGUF file of somebody else is pruned on its grid and written again; nothing else changes."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.errors import (
    ArtifactError,
    FormatError,
    ModelError,
    OptimumOrderError,
    OrderError,
)
from optimum_order.formats import gguf_vocabulary
from optimum_order.formats.gguf_published import FILE, stage

gguf = pytest.importorskip("gguf")
from gguf import GGMLQuantizationType as Type  # noqa: E402  (after the check)

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IDS = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))
PLAIN = {"blk": Type.Q4_0, "token_embd": Type.Q8_0, "output": Type.Q6_K}
"""The types of most published files: an embedding and a head of types of their own."""


@pytest.fixture(scope="module")
def processor():
    return JointCompressor.from_pretrained("tiny-llama").source.processor


def write(folder, processor=None, **sizes):
    """Write a GGUF file of float32 values."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}, initializer_range=0.1))
    compressor = JointCompressor(model, processor)
    result = compressor.compress("magnitude:0", format="gguf", progress=False)
    result.save_pretrained(folder / "out", "gguf")
    return folder / "out" / FILE


@pytest.fixture(scope="module")
def dense(processor, tmp_path_factory):
    return write(tmp_path_factory.mktemp("dense"), processor)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The same without a tokenizer, which takes long to read."""
    return write(tmp_path_factory.mktemp("bare"), vocab_size=64)


def superblocks(shape, kind, seed):
    """Random bytes of a K-quant with scales of either sign, which the package does not make."""
    size, places = {Type.Q6_K: (210, (208,)), Type.Q3_K: (110, (108,)), Type.Q4_K: (144, (0, 2))}[
        kind
    ]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (int(np.prod(shape[:-1])), shape[-1] // 256, size), np.uint8)
    for place in places:
        scale = (random.standard_normal(data.shape[:2]) * 1e-4).astype(np.float16)
        if kind == Type.Q4_K:
            scale = abs(scale)
        data[..., place : place + 2] = scale[..., None].view(np.uint8)
    return data.reshape(*shape[:-1], -1)


def publish(source, file, kinds, fields=(), drop=(), rename=()):
    """Write a file as somebody else would, by the package `gguf` alone.

    Args:
        source: A file of values.
        file: The file to write.
        kinds: Types of tensors, by what their names contain; the last one counts.
        fields: Fields to set.
        drop: Fields and tensors to leave out.
        rename: Other names of tensors.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(file, "llama")
    said = {
        key: (field.contents(), field.types)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and key not in ("general.architecture", "optimum_order")
    }
    said["general.name"] = ("Somebody's", [gguf.GGUFValueType.STRING])
    for key, (value, types) in {**said, **dict(fields)}.items():
        if key not in drop:
            writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    for seed, tensor in enumerate(reader.tensors):
        kind = None
        if len(tensor.shape) > 1:
            kind = next(
                (
                    kinds[part]
                    for part in reversed(kinds)
                    if tensor.name.startswith(part) or f".{part}" in tensor.name
                ),
                None,
            )
        name = dict(rename).get(tensor.name, tensor.name)
        if tensor.name in drop:
            continue
        if kind is None:
            writer.add_tensor(name, np.array(tensor.data))
        elif kind in (Type.Q6_K, Type.Q3_K, Type.Q4_K):
            data = superblocks(tensor.data.shape, kind, seed)
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            data = gguf.quantize(np.array(tensor.data, dtype=np.float32), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def values(tensor):
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))


def compare(before, after, sparsity, layers="blk"):
    """Assert that two files differ in pruned weights alone; the sparsity is of quantized layers."""
    one, other = gguf.GGUFReader(before), gguf.GGUFReader(after)
    anew = {"optimum_order", "general.file_type", "GGUF.kv_count", "general.quantization_version"}
    said, says = (
        {key: (f.contents(), f.types) for key, f in reader.fields.items() if key not in anew}
        for reader in (one, other)
    )
    assert said == says
    tensors = {tensor.name: tensor for tensor in other.tensors}
    assert tensors.keys() == {tensor.name for tensor in one.tensors}
    zeros = total = 0
    for tensor in one.tensors:
        now = tensors[tensor.name]
        assert now.tensor_type == tensor.tensor_type, tensor.name
        if not tensor.name.startswith(layers) or len(tensor.shape) < 2:
            assert now.data.tobytes() == tensor.data.tobytes(), tensor.name
            continue
        first, second = values(tensor), values(now)
        changed = first != second
        assert not second[changed].any(), tensor.name
        zeros += int((second == 0).sum())
        total += second.numel()
        if tensor.tensor_type == Type.Q4_0:  # byte for byte: each holds two codes
            same = ~changed.view(len(changed), -1, 2, 16).transpose(2, 3).any(-1).view(-1)
            codes, others = (
                torch.from_numpy(np.array(t.data)).view(-1, 18)[:, 2:].reshape(-1)
                for t in (tensor, now)
            )
            scales, ours = (np.array(t.data).reshape(-1, 18)[:, :2] for t in (tensor, now))
            assert torch.equal(codes[same], others[same]), tensor.name
            assert (scales == ours).all(), tensor.name
    assert abs(zeros / total - sparsity) < 0.1, zeros / total


@pytest.mark.parametrize(
    "kinds",
    [
        PLAIN,
        {"blk": Type.Q8_0, "ffn_up": Type.Q5_0, "token_embd": Type.F16},
        {"blk": Type.Q6_K, "attn_v": Type.Q3_K, "ffn_down": Type.Q4_0, "output.weight": Type.Q4_K},
    ],
)
def test_survivors_keep_their_codes(bare, kinds, tmp_path):
    file = publish(bare, tmp_path / "theirs.gguf", kinds)
    compressor = JointCompressor.from_pretrained(
        file, calibration=IDS, calibration_samples=4, sequence_length=32
    )
    expected = compressor.estimate("wanda:0.5", format="gguf").steps[-1]
    result = compressor.compress("wanda:0.5", progress=False)
    assert result.sparsity == 0.5 and len(result.layers) == 14
    assert result.save_pretrained(tmp_path / "out") == "gguf"
    assert verify(tmp_path / "out") == []
    compare(file, tmp_path / "out" / FILE, 0.5)
    assert expected.bytes == (tmp_path / "out" / FILE).stat().st_size
    # once more: from our folder, where all zeros were pruned, or else from the file in it
    whole = all((state.weight == 0).sum() == state.pruned.sum() for state in result.layers.values())
    again = JointCompressor.from_pretrained(tmp_path / "out" / ("" if whole else FILE))
    second = again.compress("magnitude:0.7", progress=False)
    second.save_pretrained(tmp_path / "again", "gguf")
    assert verify(tmp_path / "again") == []
    compare(file, tmp_path / "again" / FILE, 0.7)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=FILE, config=config, dtype="auto"
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)


def test_layers_without_zero_are_refused_and_the_others_are_not(bare, tmp_path):
    kinds = {"blk": Type.Q8_0, "attn_v": Type.Q4_1, "ffn_down": Type.Q4_K}
    file = publish(bare, tmp_path / "theirs.gguf", kinds)
    compressor = JointCompressor.from_pretrained(file)
    for order in ("magnitude:0.5", "magnitude:0.3 > rtn:4"):
        with pytest.raises(OrderError, match=r"4 of 14 layers, such as .*v_proj'.* option targets"):
            compressor.compress(order, progress=False)
        with pytest.raises(OrderError, match="4 of 14 layers"):
            compressor.estimate(order, format="gguf")
    result = compressor.compress(
        "magnitude(sparsity=0.5, targets='re:.*(q|k|o|gate|up)_proj')", progress=False
    )
    result.save_pretrained(tmp_path / "out", "gguf")
    assert verify(tmp_path / "out") == []
    compare(file, tmp_path / "out" / FILE, 0.35)
    mixed = compressor.compress("magnitude(sparsity=0.5, off_grid=true) > rtn:4", progress=False)
    assert mixed.sparsity == 0.5


def test_other_formats_refuse_the_grid_before_the_work(bare, tmp_path):
    file = publish(bare, tmp_path / "theirs.gguf", PLAIN)
    compressor = JointCompressor.from_pretrained(file)
    for format in ("compressed-tensors", "gptq", "sparse", "coded"):
        with pytest.raises(FormatError, match="ForeignBlockGrid is not .* dense, gguf can"):
            compressor.check_format("magnitude:0.5", format)
    assert compressor.check_format("magnitude:0.5", "auto", engine="llama.cpp") == "gguf"


@pytest.fixture(scope="module")
def benchmark():
    """The module benchmarks/run_llama.py."""
    spec = importlib.util.spec_from_file_location("run_llama", ROOT / "benchmarks" / "run_llama.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_experts_and_other_families(benchmark, processor, tmp_path):
    """From the file alone where transformers reads its config; otherwise with the config beside."""
    for name, beside in [
        ("qwen3_moe", False),
        ("gemma3", True),
        ("phi3", False),
        ("mixtral", True),
        ("llama with biases, scaled", True),
    ]:
        first = JointCompressor(benchmark.build(name), processor=processor).compress(
            "rtn(bits=4, group_size=32)", format="gguf", progress=False
        )
        folder = tmp_path / name
        first.save_pretrained(folder / "first", "gguf")
        (folder / "theirs").mkdir()
        for file in (FILE, "config.json") if beside else (FILE,):
            shutil.copy(folder / "first" / file, folder / "theirs" / file)
        compressor = JointCompressor.from_pretrained(folder / "theirs")
        result = compressor.compress("magnitude:0.5", progress=False)
        assert result.layers.keys() == first.layers.keys(), name
        result.save_pretrained(folder / "out", "gguf")
        assert verify(folder / "out") == [], name
        compare(folder / "theirs" / FILE, folder / "out" / FILE, 0.5)
        if beside:
            (folder / "theirs" / "config.json").unlink()
            with pytest.raises(ModelError, match=r"config\.json .* beside it"):
                JointCompressor.from_pretrained(folder / "theirs")


def number(value):
    return value, [gguf.GGUFValueType.UINT32]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"fields": {"llama.block_count": number(2**31)}}, "2147483648 blocks"),
        ({"fields": {"llama.block_count": number(1)}}, "has a tensor 'blk.1.*no place"),
        ({"fields": {"llama.block_count": number(3)}}, "tensor 'blk.2.*has none"),
        ({"fields": {"llama.embedding_length": number(2**31)}}, "the embedding is"),
        ({"fields": {"llama.attention.head_count": number(0)}}, "no model|config"),
        ({"fields": {"llama.attention.head_count_kv": number(4)}}, "blk.0.attn_k.weight"),
        ({"fields": {"llama.feed_forward_length": number(2**31)}}, "2147483648, 256"),
        ({"fields": {"llama.rope.scaling.factor": number(4)}}, "llama.rope.scaling.factor = 4"),
        ({"fields": {"llama.logit_scale": number(4)}}, "llama.logit_scale = 4"),
        ({"fields": {"split.count": number(3)}}, "one of 3 files .* --merge"),
        ({"drop": ["llama.block_count"]}, "blocks|tensor"),
        ({"drop": ["token_embd.weight"]}, "GGUF file has none"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "'blk.1.ffn_up.weight'.* has none"),
        ({"rename": {"blk.1.ffn_up.weight": "blk.1.attn_q.bias"}}, "has none"),
        ({"kinds": {"blk": Type.TQ1_0}}, "type 34, which is none that we write"),
    ],
)
def test_what_does_not_fit_together_is_one_line(bare, change, match, tmp_path):
    file = publish(bare, tmp_path / "theirs.gguf", **{"kinds": PLAIN, **change})
    with pytest.raises(ModelError, match=match) as caught:
        JointCompressor.from_pretrained(file)
    assert "\n" not in str(caught.value)


def test_places_that_hold_no_single_model(bare, tmp_path):
    file = publish(bare, tmp_path / "theirs.gguf", PLAIN)
    with pytest.raises(ModelError, match="leave out dtype"):
        JointCompressor.from_pretrained(file, dtype="bfloat16")
    with pytest.raises(ModelError, match="leave out low_memory"):
        JointCompressor.from_pretrained(file).compress(
            "magnitude:0.5", work_dir=tmp_path / "work", low_memory=True, progress=False
        )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 7}))
    with pytest.raises(ModelError, match="the embedding is"):
        JointCompressor.from_pretrained(file)
    (tmp_path / "config.json").unlink()
    shutil.copy(file, tmp_path / "other.gguf")
    with pytest.raises(ModelError, match="holds 2 GGUF files: name one"):
        JointCompressor.from_pretrained(tmp_path)
    with pytest.raises(ModelError):
        JointCompressor.from_pretrained(tmp_path / "absent.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small file."""
    folder = tmp_path_factory.mktemp("small")
    file = write(folder, vocab_size=64, hidden_size=64, intermediate_size=64)
    return publish(file, folder / "s.gguf", {"blk": Type.Q4_0}).read_bytes()


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(at=st.integers(0, 2000), patch=st.binary(min_size=1, max_size=4))
def test_a_file_that_was_changed_is_read_or_refused(small, at, patch, tmp_path):
    """By nothing but an error of ours."""
    begin = small[:at] + patch + small[at + len(patch) :]
    for data in (begin, small[: at * len(small) // 2001]):
        (tmp_path / "x.gguf").write_bytes(data)
        shutil.rmtree(tmp_path / "staged", ignore_errors=True)
        (tmp_path / "staged").mkdir()
        try:
            stage(tmp_path / "x.gguf", tmp_path / "staged")
        except OptimumOrderError as error:
            assert "\n" not in str(error)
        else:
            assert data is begin, "a file that was cut is read"


# Tokenizers


def test_a_tokenizer_is_made_of_what_the_file_says(benchmark):
    made = 0
    for name, tokenizer in benchmark.tokenizers().items():
        rows = len(tokenizer) + 3
        fields = gguf_vocabulary.fields(tokenizer, rows)
        if fields["tokenizer.ggml.model"] == "llama":
            with pytest.raises(FormatError):
                gguf_vocabulary.tokenizer(fields, rows)
            continue
        ours = gguf_vocabulary.tokenizer(fields, rows)
        for text in (*benchmark.TEXTS, "a<s>b</s>", ""):
            assert ours(text)["input_ids"] == tokenizer(text)["input_ids"], (name, text)
        assert gguf_vocabulary.fields(ours, rows) == fields, name
        made += 1
    assert made == 5


def test_tokens_around_a_text_and_the_chat_template_come_along(processor):
    rows = len(processor)
    fields = gguf_vocabulary.fields(processor, rows)
    fields |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    fields["tokenizer.chat_template"] = "{{ messages }}"
    made = gguf_vocabulary.tokenizer(fields, rows)
    bare = processor("a b")["input_ids"]
    assert made("a b")["input_ids"] == [0, *bare, 1] and made.chat_template == "{{ messages }}"
    assert made("a", "b")["input_ids"].count(0) == 2


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pre": "deepseek-llm"}, FormatError),
        ({"model": "bert"}, FormatError),
        ({"model": 3}, ArtifactError),
        ({"tokens": []}, ArtifactError),
        ({"tokens": [1, 2]}, ArtifactError),
        ({"tokens": ["a"] * 9000}, ArtifactError),
        ({"merges": ["no pair of these"]}, ArtifactError),
        ({"merges": ["single"]}, ArtifactError),
        ({"merges": [3]}, ArtifactError),
        ({"token_type": [1]}, ArtifactError),
        ({"bos_token_id": -1}, ArtifactError),
        ({"bos_token_id": "0"}, ArtifactError),
        ({"add_bos_token": 1}, ArtifactError),
    ],
)
def test_fields_that_are_none_of_a_tokenizer(processor, change, error):
    fields = gguf_vocabulary.fields(processor, len(processor))
    fields |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(error):
        gguf_vocabulary.tokenizer(fields, len(processor))


def test_tokenizers_come_with_the_file_and_go_with_it(dense, processor, tmp_path, caplog):
    """One that nobody knows stays in the file for llama.cpp."""
    for rule in ("gpt-2", "deepseek-llm"):
        fields = {"tokenizer.ggml.pre": (rule, [gguf.GGUFValueType.STRING])}
        file = publish(dense, tmp_path / f"{rule}.gguf", PLAIN, fields=fields)
        compressor = JointCompressor.from_pretrained(file)
        made = compressor.source.processor
        result = compressor.compress("magnitude:0.5", progress=False)
        result.save_pretrained(tmp_path / rule, "gguf")
        compare(file, tmp_path / rule / FILE, 0.5)
        if rule == "gpt-2":
            assert made("a b, 12")["input_ids"] == processor("a b, 12")["input_ids"]
            assert (tmp_path / rule / "tokenizer.json").exists()
            assert "tokenizer" not in caplog.text
        else:
            assert made is None and "put the tokenizer.json" in caplog.text
