"""In which formats an order's result could be saved, and what they take: as when they are saved."""

import pytest

from optimum_order import JointCompressor, estimate
from optimum_order.engine.recipe import canonical
from optimum_order.errors import FormatError
from optimum_order.estimate.options import Demand, Sizes
from optimum_order.files import weight_bytes
from optimum_order.models.units import find_units
from optimum_order.order import Order


@pytest.fixture(scope="module")
def compressor(make_model):
    return JointCompressor(make_model("llama", hidden_size=64, intermediate_size=96), device="cpu")


def smallest(compressor, order, **demand):
    empty = estimate.empty(compressor.source)
    sizes = Sizes(empty, find_units(empty), {}, Demand(**demand))
    return sizes, sizes.smallest(canonical(Order.parse(order)))


@pytest.mark.parametrize(
    ("order", "demand", "format"),
    [
        ("rtn(bits=4, group_size=32)", {"engine": "transformers"}, "compressed-tensors"),
        ("rtn(bits=4, group_size=32)", {"engine": "vllm"}, "compressed-tensors"),
        ("magnitude:0.5", {"format": "dense"}, "dense"),
    ],
)
def test_what_is_sure_is_sure_to_the_byte(compressor, order, demand, format, tmp_path):
    sizes, option = smallest(compressor, order, **demand)
    assert (option.format, option.exact) == (format, True)
    compressed = compressor.compress(order, progress=False)
    engine = demand.get("engine")
    assert compressed.save_pretrained(tmp_path / "out", option.format, engine=engine) == format
    assert weight_bytes(tmp_path / "out") == option.bytes
    bits = compressed.manifest["bytes"]["per_weight_bits"]
    assert option.bits == pytest.approx(bits, abs=1e-3)
    assert sizes.bits_at(sizes.bytes_at(3.0)) == pytest.approx(3.0, abs=1e-3)


def test_with_no_engine_the_format_of_the_fewest_bytes_is_taken(compressor):
    _, option = smallest(compressor, "magnitude:0.7 > rtn:4")
    assert option.format in ("coded", "sparse") and not option.exact


def test_integers_with_steps_of_columns_are_transcoded_for_engines(compressor):
    for engine in ("transformers", "vllm"):
        _, option = smallest(compressor, "ecsq(rate=3, max_code=7)", engine=engine)
        assert (option.format, option.exact) == ("compressed-tensors", True)
        assert 4 < option.bits < 4.6


def test_what_cannot_be_run_or_loaded_is_no_option(compressor):
    for order, demand in [
        ("rtn(bits=4, group_size=128)", {}),  # does not divide 64 inputs
        ("rtn(bits=3, group_size=32)", {"engine": "vllm"}),
        ("rtn(bits=4, group_size=32)", {"format": "bitsandbytes"}),
        ("mixed_precision(bits=3, group_size=32)", {"engine": "vllm"}),
    ]:
        assert smallest(compressor, order, **demand)[1] is None


def test_unknown_names_are_refused():
    Demand("dense", "vllm").check()
    for demand in (Demand("dens"), Demand(engine="vlm")):
        with pytest.raises(FormatError, match="Did you mean"):
            demand.check()


def test_a_gguf_file_is_as_large_as_predicted_with_its_tokenizer(tmp_path):
    compressor = JointCompressor.from_pretrained("tiny-llama")
    empty = estimate.empty(compressor.source)
    beside = {"processor": compressor.source.processor}
    sizes = Sizes(empty, find_units(empty), {}, Demand("gguf"), beside)
    for order in ("rtn(bits=4, group_size=32)", "rtn:q4_k"):
        predicted = sizes.smallest(Order.parse(order))
        compressor.compress(order, format="gguf", progress=False).save_pretrained(
            tmp_path / order, "gguf"
        )
        assert predicted.exact and predicted.format == "gguf"
        assert predicted.bytes == (tmp_path / order / "model.gguf").stat().st_size
    bare = Sizes(empty, find_units(empty), {}, Demand("gguf")).smallest(Order.parse(order))
    assert bare.bytes < predicted.bytes - 50_000, "the tokenizer counts"
