import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optimum_order.errors import OrderError
from optimum_order.order import Order, Stage, matches

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,12}", fullmatch=True)


def stays_text(text: str) -> bool:
    """Return whether the text is a value, and not a number or a truth."""
    try:
        return Stage("m", text).value == text
    except OrderError:
        return False


scalars = st.one_of(
    st.booleans(),
    st.integers(-(10**18) + 1, 10**18 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.from_regex(r"[A-Za-z0-9_.:/*?>+-]{1,20}", fullmatch=True).filter(stays_text),
    st.text(min_size=1, max_size=20).filter(stays_text),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
stages = st.one_of(
    st.builds(Stage, names),
    st.builds(Stage, names, values),
    st.builds(
        lambda method, options: Stage(method, **options),
        names,
        st.dictionaries(names, values, max_size=4),
    ),
)
orders = st.lists(stages, min_size=1, max_size=4).map(Order)


def same(a, b) -> bool:
    """Equality that, unlike Python's, tells 1 from 1.0 from True."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(orders)
@settings(max_examples=300, deadline=None)
def test_what_is_printed_parses_to_itself(order):
    parsed = Order.parse(str(order))
    assert parsed == order
    assert str(parsed) == str(order)
    for before, after in zip(order, parsed, strict=True):
        assert same(before.value, after.value)
        assert same(before.options, after.options)


@given(
    st.one_of(
        st.text(max_size=60), st.text(alphabet="ab01_.:/+-=,>→*?'\"()[] \nenftrue", max_size=60)
    )
)
@settings(max_examples=500, deadline=None)
@example("a:" + "0" * 20 + "9" * 5000)
@example("a:" + "9" * 5000)
@example("a:1e999999999")
@example("a:" + "[" * 10_000)
@example("a(" * 5_000)
@example("a > " * 4_000 + "a")
@example("x" * 1_000_000)
@example("\ud800")
@example("wanda:٥")  # a digit, but not one of ours
def test_any_text_is_an_order_or_an_order_error(text):
    try:
        order = Order.parse(text)
    except OrderError as error:
        assert str(error)
        return
    assert Order.parse(str(order)) == order


@given(st.recursive(st.one_of(scalars, st.none(), st.text(), st.binary(), st.floats()), st.lists))
@settings(max_examples=200, deadline=None)
def test_any_value_survives_or_is_refused(value):
    try:
        stage = Stage("m", option=value)
    except OrderError:
        return
    assert Order.parse(str(stage)) == Order([stage])


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("wanda:0.5 > gptq:4", "wanda:0.5 > gptq:4"),
        ("  wanda :0.5>gptq( group_size = 64,bits=4 ) ", "wanda:0.5 > gptq(bits=4, group_size=64)"),
        ("wanda:.50", "wanda:0.5"),
        ("gptq:+04", "gptq:4"),
        ("bitsandbytes:nf4", "bitsandbytes:nf4"),
        ("wanda(pattern=2:4)", "wanda(pattern=2:4)"),
        ("rtn(symmetric=false, bits=4)", "rtn(bits=4, symmetric=false)"),
        (
            "mixed_precision(bits=4.5, widths=[ 2, 4,8 ])",
            "mixed_precision(bits=4.5, widths=[2,4,8])",
        ),
        ("a:[]", "a:[]"),
        ("a:[[1,b],true]", "a:[[1,b],true]"),
        ("rtn\n>\twanda:1e-3", "rtn > wanda:0.001"),
        ("wanda:0.5->gptq:4", "wanda:0.5 > gptq:4"),
        ("wanda:0.5 -> gptq:4", "wanda:0.5 > gptq:4"),
        ("wanda→gptq:4 → rtn", "wanda > gptq:4 > rtn"),
        ("wanda:0.5+gptq:4", "wanda:0.5 > gptq:4"),
        ("wanda(pattern=2:4) + gptq+rtn", "wanda(pattern=2:4) > gptq > rtn"),
        ("wanda:+1e+3+gptq:+4", "wanda:1000.0 > gptq:4"),
        ("a:x- > b:1-2", "a:x- > b:1-2"),
        ("gptq(bits=4, targets=[*.q_proj, *.k_proj])", "gptq(bits=4, targets=[*.q_proj,*.k_proj])"),
        ("gptq(targets='*.down_pro?')", "gptq(targets=*.down_pro?)"),
        ('gptq(targets="*.[qk]_proj")', "gptq(targets='*.[qk]_proj')"),
        (r"gptq(targets='re:a\.(b|c)+, > d')", r"gptq(targets='re:a\.(b|c)+, > d')"),
        ("""a:"it's" > b:'say "x"'""", """a:"it's" > b:'say "x"'"""),
    ],
)
def test_one_canonical_form(text, printed):
    assert str(Order.parse(text)) == printed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("-4", -4),
        ("4.0", 4.0),
        ("1e20", 1e20),
        ("true", True),
        ("false", False),
        ("nf4", "nf4"),
        ("nan", "nan"),
        ("1e999", "1e999"),
        ("True", "True"),
        ("9" * 19, "9" * 19),
        ("0" * 30 + "7", 7),
        ("2:4", "2:4"),
        ("[1,2]", (1, 2)),
    ],
)
def test_values_are_numbers_truths_words_or_lists(text, value):
    assert same(Order.parse(f"m:{text}")[0].value, value)
    assert same(dict(Order.parse(f"m(key={text})")[0].options)["key"], value)


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("wanda:0.5 >", 12, "the name of a method"),
        ("> wanda", 1, "the name of a method"),
        ("wanda:0.5 gptq:4", 11, "'>' and another stage"),
        ("wanda:", 7, "a value"),
        ("wanda(", 7, "the name of an option"),
        ("wanda()", 7, "the name of an option"),
        ("wanda(sparsity)", 15, "'='"),
        ("wanda(sparsity=0.5", 19, "')'"),
        ("wanda(sparsity=0.5, )", 21, "the name of an option"),
        ("a:[1,2", 7, "']'"),
        ("a:" + "[" * 9 + "]" * 9, 12, "lists nested at most 8 deep"),
        ("a:'b", 3, "text that ends with the quote it begins with"),
        ("a(b=*.[qk])", 7, "')'"),
        ("a:b+", 5, "the name of a method"),
        ("wanda;gptq", 6, "'>' and another stage"),
    ],
)
def test_an_error_names_the_position_what_was_expected_and_the_cure(text, position, expected):
    with pytest.raises(OrderError) as caught:
        Order.parse(text)
    message = str(caught.value)
    assert f"expected {expected}" in message
    assert f"at character {position}," in message
    assert "Write it like 'wanda:0.5 > gptq(bits=4, group_size=64)'" in message
    assert "\n" not in message


def test_an_error_is_one_line_even_if_the_text_is_not():
    with pytest.raises(OrderError) as caught:
        Order.parse("wanda:0.5\n> >\ngptq:4")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Order.parse(""), "at least one stage"),
        (lambda: Order.parse(" \n"), "at least one stage"),
        (lambda: Order([]), "at least one stage"),
        (lambda: Order([1]), "Stage objects or their text, got 1"),
        (lambda: Order.parse(None), "got None"),
        (lambda: Order.parse("a(b=1, b=2)"), "gives option 'b' twice"),
        (
            lambda: Stage("two words"),
            "begins with the name of a method such as 'wanda', got 'two words'",
        ),
        (lambda: Stage(""), "begins with the name of a method"),
        (lambda: Stage("wanda", 0.5, pattern="2:4"), "both a bare value and named options"),
        (lambda: Stage("wanda", **{"a b": 1}), "'a b' cannot be the name of an option"),
        (lambda: Stage("wanda", math.nan), "the value must be a finite number, got nan"),
        (
            lambda: Stage("wanda", sparsity=math.inf),
            "option 'sparsity' must be a finite number, got inf",
        ),
        (lambda: Stage("wanda", "true"), "must be a number, true, false, one line of text"),
        (lambda: Stage("wanda", "0.5"), "must be a number, true, false, one line of text"),
        (lambda: Stage("wanda", ""), "must be a number, true, false, one line of text"),
        (lambda: Stage("wanda", "a\nb"), "must be a number, true, false, one line of text"),
        (lambda: Stage("wanda", "'\""), "must be a number, true, false, one line of text"),
        (lambda: Order.parse("wanda:'0.5'"), "must be a number, true, false, one line of text"),
        (lambda: Stage("wanda", 10**18), "must be a number, true, false, one line of text"),
        (lambda: Stage("wanda", {"a": 1}), "must be a number, true, false, one line of text"),
        (lambda: Stage.parse("a > b"), "Expected one stage, got 2"),
        (lambda: Order.parse("a" * 20_001), "at most 20000 characters long, got 20001"),
        (lambda: Order([Stage("a" * 15_000)] * 2), "at most 20000 characters long, got 30003"),
    ],
)
def test_what_cannot_be_written_is_refused(make, message):
    with pytest.raises(OrderError) as caught:
        make()
    assert message in str(caught.value)


def test_lists_nest_as_deep_in_python_as_in_text():
    def nested(depth):
        value = 1
        for _ in range(depth):
            value = [value]
        return value

    assert Order.parse(str(Stage("a", nested(8))))[0] == Stage("a", nested(8))
    with pytest.raises(OrderError, match="nested at most 8 deep"):
        Stage("a", nested(9))
    with pytest.raises(OrderError, match="nested at most 8 deep"):
        Stage("a", nested(100_000))


def test_numbers_of_numpy_print_like_numbers():
    assert str(Stage("wanda", np.float64(0.5))) == "wanda:0.5"


def test_an_order_is_a_tuple_of_stages():
    order = Order.parse("wanda:0.5 > gptq:4 > wanda:0.5")
    assert len(order) == 3
    assert list(order) == [Stage("wanda", 0.5), Stage("gptq", 4), Stage("wanda", 0.5)]
    assert order[1] == Stage("gptq", 4)
    assert hash(order) == hash(Order.parse(str(order)))
    assert order != Order.parse("gptq:4 > wanda:0.5 > wanda:0.5")


def test_of_takes_every_way_an_order_is_written():
    expected = Order([Stage("wanda", 0.5), Stage("gptq", 4)])
    for written in (
        "wanda:0.5 > gptq:4",
        ["wanda:0.5", Stage("gptq", 4)],
        iter(["wanda:0.5", "gptq:4"]),
        expected,
    ):
        assert Order.of(written) == expected
    assert Order.of(Stage("rtn", 4)) == Order.parse("rtn:4")


@given(st.lists(st.sampled_from(["a", "b:1", "c(x=2)"]), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_permutations_are_every_distinct_order_once_and_this_one_first(written):
    order = Order(written)
    orders = [str(permutation) for permutation in order.permutations()]
    assert orders[0] == str(order)
    assert len(orders) == len(set(orders))
    assert set(orders) == {" > ".join(texts) for texts in itertools.permutations(written)}


def test_knows_no_torch():
    code = "import sys, optimum_order.order; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_pattern_is_of_the_shell_or_a_regular_expression():
    layer = "model.layers.1.mlp.up_proj"
    for pattern in ("*.up_proj", "*.mlp.*", layer, "model.layers.?.mlp.*", "*[uq]p_proj"):
        assert matches(layer, pattern)
    for pattern in (
        "up_proj",
        "*.UP_PROJ",
        "re:up_proj",
        "re:.*up_pro",
        "re:.*down.*",
        ".*up_proj",
    ):
        assert not matches(layer, pattern)
    assert matches(layer, r"re:model\.layers\.[01]\..*(up|down)_proj")
    with pytest.raises(OrderError, match=r"'re:\(' is not a regular expression after 're:'"):
        matches(layer, "re:(")


def test_text_of_version_0_1_0_reads_as_before():
    """Every order of the methods of that version, as its manifests and work dirs hold it."""
    for text in (
        "magnitude(scope=global, sparsity=0.5) > rtn(bits=4, group_size=128, symmetric=false)",
        "wanda(pattern=2:4) > gptq(act_order=true, bits=4, damping=0.01)",
        "sparsegpt:0.5 > bitsandbytes:nf4",
        "mixed_precision(bits=4.5, method=gptq, widths=[2,4,8]) > magnitude:1e-05",
    ):
        assert str(Order.parse(text)) == text


def test_an_order_from_text_is_the_order_it_spells():
    assert (
        Order("wanda:0.5 > gptq:4")
        == Order.parse("wanda:0.5 > gptq:4")
        == Order.of("wanda:0.5 > gptq:4")
    )
