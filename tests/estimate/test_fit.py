"""A format that could not hold the result is refused before anything is compressed."""

import functools

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.errors import FormatError
from optimum_order.formats import available

REFUSED = [
    ("llama", "rtn:4", "bitsandbytes", "UniformGrid is not a grid of the bitsandbytes"),
    ("llama", "bitsandbytes:int8", "compressed-tensors", "RowGrid is not a grid of equal steps"),
    ("llama", "magnitude:0.5", "compressed-tensors", "No layer is quantized"),
    ("llama", "rtn(bits=4, symmetric=false)", "compressed-tensors", "zero points"),
    ("llama", "rtn:4 > magnitude(off_grid=true, sparsity=0.5)", "gptq", "No layer is quantized"),
    ("llama", "rtn(bits=5, group_size=16)", "gptq", "5 bits"),
    ("gpt2", "gptq:4", "compressed-tensors", "Conv1D"),
    ("mixtral", "bitsandbytes:int8", "bitsandbytes", "fused expert"),
    ("llama", "rtn(bits=4, group_size=16)", "gptq", "does not divide into words of 32 bits"),
]
HELD = [
    ("llama", "wanda:0.5 > gptq:4", "compressed-tensors"),
    ("llama", "mixed_precision:4", "compressed-tensors"),
    ("llama", "magnitude:0.5", "sparse"),
    ("gpt2", "bitsandbytes:int8", "bitsandbytes"),
    ("mixtral", "rtn(bits=4, group_size=16)", "compressed-tensors"),
]


def compressor(model, text_file):
    options = {"calibration_samples": 2, "sequence_length": 16, "device": "cpu"}
    return JointCompressor(model.to(torch.bfloat16), calibration=None, **options)


@pytest.fixture
def never_run(monkeypatch):
    """Make it an error to compress."""

    def run(*args, **kwargs):
        raise AssertionError("it was compressed")

    monkeypatch.setattr("optimum_order.compressor.run", run)


def test_what_cannot_be_held_is_refused_before_the_work(make_model, text_file, never_run):
    for architecture, order, format, reason in REFUSED:
        subject = compressor(make_model(architecture), text_file)
        subject.calibration = "builtin" if "gptq:" in order else None
        with pytest.raises(FormatError, match=reason):
            subject.check_format(order, format)
        with pytest.raises(FormatError, match=reason) as refusal:
            subject.compress(order, format=format, progress=False)
        named = str(refusal.value).rpartition("choose '")[2].partition("'")[0]
        subject.check_format(order, named)  # the advice is one that works


def test_what_can_be_held_is_not(make_model, text_file):
    for architecture, order, format in HELD:
        subject = compressor(make_model(architecture), text_file)
        subject.calibration = "builtin"
        subject.check_format(order, format)


def test_convolutions_are_refused_before_the_work(make_image_model, never_run):
    subject = JointCompressor(make_image_model("resnet"), calibration=None, device="cpu")
    with pytest.raises(FormatError, match="a convolution, .* dense, sparse can; choose 'dense'"):
        subject.compress("rtn(bits=4, group_size=-1)", format="compressed-tensors", progress=False)
    with pytest.raises(FormatError, match="Unknown format"):
        subject.compress("rtn(bits=4, group_size=-1)", format="ggml", progress=False)


def test_a_prediction_is_what_saving_says(make_model, text_file, tmp_path):
    orders = ("rtn:4", "magnitude:0.5", "bitsandbytes:int8", "rtn(bits=3, symmetric=false)")
    for order in orders:
        subject = compressor(make_model("llama"), text_file)
        done = subject.compress(order, progress=False)
        for format in available():
            verdicts = []
            asks = [
                functools.partial(subject.check_format, order, format),
                functools.partial(done.save_pretrained, tmp_path / f"{format} {order}", format),
            ]
            for ask in asks:
                try:
                    ask()
                    verdicts.append(None)
                except FormatError as error:
                    verdicts.append(str(error))
            assert verdicts[0] == verdicts[1], (order, format)


def test_of_several_orders_only_what_none_could_be_saved_as_is_refused(make_model, text_file):
    subject = compressor(make_model("llama"), text_file)
    stages = ["rtn:4", "magnitude(sparsity=0.5, off_grid=true)"]
    subject.check_format("auto", "compressed-tensors", stages=stages)
    with pytest.raises(FormatError):
        subject.check_format(" > ".join(stages), "compressed-tensors")
    with pytest.raises(FormatError):
        subject.check_format("auto", "bitsandbytes", stages=stages)
