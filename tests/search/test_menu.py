"""The recipes that a search considers: all kinds of them, within what is allowed."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_order import JointCompressor, estimate, formats
from optimum_order.engine.recipe import canonical, with_embedding
from optimum_order.estimate.options import Demand, Sizes
from optimum_order.models.units import find_units
from optimum_order.order import Order
from optimum_order.search.menu import LEAST_RATE, MARGIN, Candidate, Menu, rate_of


@pytest.fixture(scope="module")
def make_menu(make_model):
    """`make_menu(engine="vllm")`: for a tiny model whose layers have 64 and 96 inputs."""
    source = JointCompressor(make_model("llama", hidden_size=64, intermediate_size=96)).source
    empty = estimate.empty(source)
    menus = {}

    def make(columns=True, **demand) -> Menu:
        key = (columns, *demand.items())
        if key not in menus:
            sizes = Sizes(empty, find_units(empty), {}, Demand(**demand))
            menus[key] = Menu(sizes, columns)
        return menus[key]

    return make


def kinds(candidates):
    return {tuple(stage.method for stage in c.order) for c in candidates}


def test_with_any_format_rates_widths_and_pruning_on_both_sides_compete(make_menu):
    listed = make_menu().within(3.0)
    assert kinds(listed) >= {
        ("ecsq",),
        ("wanda", "ecsq"),
        ("sparsegpt", "ecsq"),
        ("ecsq", "wanda"),
        ("gptq",),
        ("wanda", "gptq"),
        ("mixed_precision",),
    }
    assert len({c.order for c in listed}) == len(listed)
    for c in listed:
        assert c.bits <= 3.0 * (1 if c.exact else 1.1)
        assert formats.available()[c.format].zeros_are_cheap or c.is_single


def test_rates_spend_what_is_allowed_but_for_a_margin(make_menu):
    menu = make_menu()
    alone = next(c for c in menu.within(3.0) if c.order[0].method == "ecsq" and c.is_single)
    assert alone.bits == rate_of(alone) == pytest.approx(3.0 * (1 - MARGIN), abs=1e-3)
    assert alone.bytes == menu.sizes.bytes_at(alone.bits)
    more = menu.at_rate(alone, 3.5)
    assert str(more.order) == "ecsq:3.5" and more.bits == 3.5
    assert rate_of(menu.at_rate(alone, 0.1)) == LEAST_RATE
    behind = Candidate(canonical(Order.parse("ecsq:4 > wanda:0.5")), "coded", 1, 3.0, False)
    assert str(menu.at_rate(behind, 4.5).order) == "ecsq:4.5 > wanda:0.5"
    assert menu.at_rate(behind, 4.5).bits == pytest.approx(3.5)
    assert rate_of(Candidate(canonical(Order.parse("gptq:4")), "dense", 1, 4.0, True)) is None


def test_stock_formats_get_widths_and_integers_for_four_bit_kernels(make_menu):
    listed = make_menu(engine="transformers").within(5.0)
    assert kinds(listed) == {("gptq",), ("mixed_precision",), ("ecsq",)}
    assert all(c.exact and c.bits <= 5.0 for c in listed)
    packed = next(c for c in listed if c.method == "ecsq")
    assert rate_of(packed) is None and dict(packed.order[0].options)["max_code"] == 7
    mixed = max(c.bits for c in listed if c.method == "mixed_precision")
    assert 4.5 < mixed <= 5.0


def test_an_engine_gets_no_width_that_it_does_not_load(make_menu):
    menu = make_menu(engine="vllm")
    assert {str(c.order[0].options) for c in menu.within(4.0)} == set()
    assert {dict(c.order[0].options).get("bits", 4) for c in menu.within(9.0)} <= {4, 8}
    assert menu.least().bits > 4


@pytest.mark.parametrize("demand", [{"format": "gguf"}, {"engine": "llama.cpp"}])
def test_llama_cpp_gets_k_quants_of_its_own_and_a_mixture_of_them(make_menu, demand):
    """The layers have 64 and 96 inputs, so each K-quant is what llama.cpp falls back to."""
    pytest.importorskip("gguf")
    menu = make_menu(**demand)
    listed = menu.within(5.6)
    assert {c.format for c in listed} == {"gguf"}
    assert all(c.exact and c.bits <= 5.6 for c in listed)
    assert "gptq:q4_k" in {str(c.order) for c in listed}
    (mixed,) = [c for c in listed if "q2_k" in str(c.order) and c.method == "mixed_precision"]
    assert str(mixed.order) == (
        "mixed_precision(bits=5.6, fuse=false, widths=[q2_k,q3_k,q4_k,q5_k,q6_k,8])"
    )
    assert 4.5 < mixed.bits <= 5.6
    assert {c.method for c in menu.curve()} == {"gptq", "mixed_precision", "ecsq"}
    assert all(rate_of(c) is None for c in menu.curve())
    for other in ({}, {"engine": "transformers"}, {"format": "coded"}):
        assert not [c for c in make_menu(**other).within(5.6) if "_k" in str(c.order)]


def test_steps_of_columns_are_alike_where_they_could_not_move(make_menu):
    fixed = make_menu(columns=False, engine="transformers")
    packed = next(c for c in fixed.within(5.0) if c.method == "ecsq")
    assert dict(packed.order[0].options)["columns"] is False


def test_the_least_is_no_larger_than_any(make_menu):
    for demand in ({}, {"engine": "transformers"}, {"format": "sparse"}):
        menu = make_menu(**demand)
        least = menu.least()
        assert all(least.bits <= c.bits for c in menu.within(6.0)), demand
        assert menu.within(least.bits * 0.9) == [], demand
    assert make_menu(format="bitsandbytes").least() is None


def test_the_curve_goes_from_few_bits_to_many(make_menu):
    for demand in ({}, {"engine": "transformers"}):
        bits = [c.bits for c in make_menu(**demand).curve()]
        assert min(bits) < 2.6 and max(bits) >= 8
        assert all(c.is_single for c in make_menu(**demand).curve())


def test_embeddings_are_counted_where_they_are_coded():
    """`ecsq` shares its rate with them; other methods leave them 8 bits."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    name = "model.embed_tokens"

    def whole(order):
        coded = any(stage.method == "ecsq" for stage in order)
        return with_embedding(order, "coded" if coded else "8", name)

    plain = Menu(Sizes(model, find_units(model), {}, Demand()))
    sizes = Sizes(model, find_units(model, embeddings=[name]), {}, Demand())
    menu = Menu(sizes, whole=whole)
    assert menu.least().bytes < plain.least().bytes
    assert menu.sizes.rest < plain.sizes.rest
    listed = menu.within(6.0)
    assert listed and all(name not in str(c.order) for c in listed)
    fixed = [c for c in listed if c.method == "gptq" and dict(c.order[0].options)["bits"] == 4]
    part = 512 * 64 / sizes.weights
    least = 3.4 * (1 - part) + 7 * part  # random codes take a little less once they are coded
    assert fixed and all(least < c.bits <= 6.0 for c in fixed)
    coded = next(c for c in listed if str(c.order).startswith("ecsq") and c.is_single)
    assert 5.9 < coded.bits <= 6.0 and coded.bytes == sizes.bytes_at(coded.bits)
