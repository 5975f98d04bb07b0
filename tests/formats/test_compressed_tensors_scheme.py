"""A scheme says of layers what compressed-tensors reads, and reads it back; others are refused."""

import itertools

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from optimum_order.errors import ArtifactError
from optimum_order.formats.compressed_tensors_scheme import PACKED, Scheme

INPUTS = ("", "int8 per token", "int8 per tensor", "fp8 per token", "fp8 per tensor")


def group(weights, inputs=None, **more):
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, **more)


def integers(**changes):
    settings = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    return QuantizationArgs(**settings | changes)


def test_every_scheme_is_read_back():
    schemes = [
        *(Scheme(b, g, "int", i) for b, g, i in itertools.product((2, 4, 8), (-1, 32), INPUTS)),
        *(Scheme(8, -1, "float", i) for i in INPUTS),
    ]
    for scheme in schemes:
        written = group(scheme.weights(), scheme.input_activations())
        again = QuantizationScheme.model_validate_json(written.model_dump_json())
        assert Scheme.read(again) == scheme


def test_a_token_gets_its_scale_when_it_is_read_and_a_tensor_from_data():
    for inputs in INPUTS[1:]:
        arguments = Scheme(8, -1, inputs=inputs).input_activations()
        assert arguments.dynamic is inputs.endswith("token")
        assert arguments.num_bits == 8
        assert arguments.type == ("float" if inputs.startswith("fp8") else "int")


def test_the_name_of_the_format_follows_from_weights_and_inputs():
    assert Scheme(4, 32).format == PACKED
    assert Scheme(8, -1, inputs="int8 per token").format == "int-quantized"
    assert Scheme(8, -1, "float").format == "naive-quantized"
    assert Scheme(8, -1, "float", "fp8 per token").format == "float-quantized"
    assert Scheme(4, 32, inputs="int8 per token").words == (
        "4 bits in groups of 32 with inputs int8 per token"
    )


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (group(None), "says nothing of weights"),
        (group(integers(symmetric=False)), "must be symmetric integers"),
        (group(integers(strategy="tensor")), "must be symmetric integers"),
        (group(integers(num_bits=8, type="float", strategy="tensor")), "or float8 by channel"),
        (
            group(
                integers(), output_activations=integers(num_bits=8, strategy="token", dynamic=True)
            ),
            "rounds outputs",
        ),
        (
            group(integers(), integers(num_bits=4, strategy="token", dynamic=True)),
            "must round inputs to symmetric int8 or float8",
        ),
        (
            group(integers(), integers(num_bits=8, symmetric=False, strategy="tensor")),
            "must round inputs to symmetric int8 or float8",
        ),
    ],
)
def test_what_is_not_made_here_is_refused(scheme, message):
    with pytest.raises(ArtifactError, match=message):
        Scheme.read(scheme)
