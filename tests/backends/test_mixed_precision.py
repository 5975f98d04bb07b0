import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_order import JointCompressor
from optimum_order.backends import Measured
from optimum_order.backends.base import needs_of
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError, OutputError
from optimum_order.layers.statistics import Gram
from optimum_order.order import Stage

WIDTHS = (2, 3, 4, 8)


def allocator(bits, **options):
    return method(Stage("mixed_precision", bits=bits, widths=WIDTHS, **options))


def table_of(chosen, sizes, errors, overhead=0):
    """One row per group and candidate; group g is two layers when g is odd."""
    layers = [(f"l{g}",) if g % 2 == 0 else (f"l{g}.q", f"l{g}.k") for g in range(len(sizes))]
    return [
        Measured(layers[g], sizes[g], stage, width, width + overhead, errors[g][w])
        for g in range(len(sizes))
        for w, (stage, width) in enumerate(zip(chosen.candidates(), WIDTHS, strict=True))
    ]


def outcome(table, passes):
    """The summed error and the average bits of an allocation."""
    chosen = {layer: stage for walk in passes for layer, stage in walk.items()}
    rows = [row for row in table if row.stage == chosen[row.layers[0]]]
    assert all(chosen[layer] == row.stage for row in rows for layer in row.layers)
    size = sum({row.layers: row.weights for row in table}.values())
    return sum(row.error for row in rows), sum(row.bits * row.weights for row in rows) / size


def best(sizes, errors, budget):
    """By trying everything."""
    total = sum(sizes)
    feasible = (
        sum(errors[g][w] for g, w in enumerate(choice))
        for choice in itertools.product(range(len(WIDTHS)), repeat=len(sizes))
        if sum(WIDTHS[w] * sizes[g] for g, w in enumerate(choice)) <= budget * total
    )
    return min(feasible)


@given(
    sizes=st.lists(st.sampled_from([64, 1000, 4096, 12_345, 1_000_000]), min_size=1, max_size=5),
    bits=st.sampled_from([2.0, 2.5, 3.1, 4.0, 5.7, 8.0]),
    scale=st.sampled_from([1.0, 1e-4, 1e-8]),
    seed=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_no_other_choice_within_the_budget_is_better(sizes, bits, scale, seed):
    errors = [[scale * seed.random() * 4.0**-width for width in WIDTHS] for _ in sizes]
    chosen = allocator(bits)
    table = table_of(chosen, sizes, errors)
    error, average = outcome(table, chosen.allocate(table))
    assert average <= bits * (1 + 1e-12)
    least = best(sizes, errors, bits)
    assert error == pytest.approx(least, rel=1e-6, abs=1e-11 * max(map(max, errors)))


def test_a_sensitive_layer_gets_the_bits_that_a_dull_one_does_not_need():
    chosen = allocator(5)
    table = table_of(chosen, [100, 100], [[1, 1, 1, 0.5], [1e-3, 1e-4, 1e-5, 1e-6]])
    (only,) = chosen.allocate(table)
    assert dict(only["l0"].options)["bits"] == 8
    assert dict(only["l1.q"].options)["bits"] == 2


def test_layers_of_one_group_get_one_width():
    chosen = allocator(3)
    errors = [[4.0**-width * (group + 1) for width in WIDTHS] for group in range(4)]
    (only,) = chosen.allocate(table_of(chosen, [10, 20, 30, 40], errors))
    assert set(only) == {"l0", "l1.q", "l1.k", "l2", "l3.q", "l3.k"}
    assert only["l1.q"] == only["l1.k"]
    assert only["l3.q"] == only["l3.k"]


def test_first_says_which_layers_come_first():
    errors = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]

    def passes(first):
        chosen = allocator(4.25, first=first)
        return chosen.allocate(table_of(chosen, [10] * 4, errors))

    def widths(walks):
        return [{dict(stage.options)["bits"] for stage in walk.values()} for walk in walks]

    together = passes("together")
    weaker = passes("weaker")
    stronger = passes("stronger")
    assert widths(together) == [{2, 3, 4, 8}]
    assert widths(weaker) == [{8}, {4}, {3}, {2}]
    assert widths(stronger) == [{2}, {3}, {4}, {8}]
    for walks in (weaker, stronger):
        names = [name for walk in walks for name in walk]
        assert len(names) == len(set(names))
        assert {name: stage for walk in walks for name, stage in walk.items()} == together[0]


def test_candidates_are_those_of_the_named_quantizer():
    for quantizer in ("gptq", "rtn"):
        chosen = allocator(4, quantizer=quantizer, group_size=32)
        assert [str(stage) for stage in chosen.candidates()] == [
            f"{quantizer}(bits={width}, group_size=32)" for width in WIDTHS
        ]
        for stage, backend in chosen.backends.items():
            assert (backend.name, str(backend.stage)) == (quantizer, str(method(stage).stage))


def test_fused_is_what_fuse_says():
    assert allocator(4).fused
    assert not allocator(4, fuse=False).fused


def test_errors_of_the_loss_need_gradients_and_inputs():
    for quantizer in ("gptq", "rtn"):
        plain, weighed = (allocator(4, quantizer=quantizer, error=e) for e in ("block", "loss"))
        assert not plain.weighs_outputs and weighed.weighs_outputs
        assert Gram in needs_of([weighed]) and Gram not in needs_of([plain])


def test_errors_of_the_loss_are_refused_for_a_model_that_is_read_in_blocks(tmp_path):
    compressor = JointCompressor.from_pretrained("tiny-llama", calibration_samples=2)
    with pytest.raises(OutputError, match="takes gradients.*or error=loss"):
        compressor.compress(
            "mixed_precision(bits=4, error=loss)",
            work_dir=tmp_path / "work",
            low_memory=True,
            progress=False,
        )
    assert not (tmp_path / "work").exists()


def test_bad_options_are_refused():
    rising = "'widths' .* must be a rising list of integers in 2..8"
    for options, message in [
        (
            {"bits": 1.5},
            r"'bits' \(average bits per weight\) must be a number in \[2, 8\], got 1.5",
        ),
        ({"bits": 9}, r"'bits' .* must be a number in \[2, 8\], got 9"),
        ({}, "must give 'bits'"),
        (
            {"bits": 2.5, "widths": (3, 4)},
            "'bits' must be at least the smallest of its widths, 3, got 2.5",
        ),
        ({"bits": 4, "widths": (4, 3)}, rising),
        ({"bits": 4, "widths": (3, 3)}, rising),
        ({"bits": 4, "widths": ()}, rising),
        ({"bits": 4, "widths": (1, 4)}, rising),
        ({"bits": 4, "widths": (2, 4.0)}, rising),
        ({"bits": 4, "widths": 4}, rising),
        ({"bits": 4, "quantizer": "wanda"}, "'quantizer' .* must be gptq or rtn, got 'wanda'"),
        ({"bits": 4, "first": "last"}, "'first' .* must be together, weaker or stronger"),
        ({"bits": 4, "error": "layer"}, "'error' .* must be block or loss, got 'layer'"),
    ]:
        with pytest.raises(OrderError, match=message):
            method(Stage("mixed_precision", **options))


def test_a_shape_is_checked_as_the_quantizer_would():
    chosen = allocator(4, group_size=64)
    assert chosen.check_shape((8, 128)) is None
    assert chosen.check_shape((8, 96)).startswith("group_size 64 does not divide its 96 inputs")


def test_a_budget_that_nothing_meets_is_refused():
    """A measured width above the smallest makes such a budget."""
    chosen = allocator(2)
    table = table_of(chosen, [10], [[1, 1, 1, 1]])
    wider = [dataclasses.replace(row, bits=row.bits + 1) for row in table]
    with pytest.raises(
        OrderError, match="narrowest widths take 3 bits .* more than 'bits', 2. Give as many"
    ):
        chosen.allocate(wider)


# K-quants

K_WIDTHS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", 8)
STORED = (2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5)


def test_k_quants_have_blocks_of_their_own_and_the_widths_beside_them_those_of_gguf():
    chosen = method(Stage("mixed_precision", bits=5, widths=("q4_k", 5, 8)))
    assert [str(stage) for stage in chosen.candidates()] == [
        "gptq(bits=q4_k)",
        "gptq(bits=5, group_size=32, scales=float16)",
        "gptq(bits=8, group_size=32, scales=float16)",
    ]
    said = Stage("mixed_precision", bits=5, widths=("q4_k", 5, 8), group_size=32, scales="float16")
    assert method(said).options == chosen.options


@pytest.mark.parametrize("budget", [2.7, 3.9, 4.5, 6.0])
def test_the_budget_of_k_quants_counts_their_scales(budget):
    chosen = method(Stage("mixed_precision", bits=budget, widths=K_WIDTHS))
    sizes = [1000, 3000, 500]
    errors = [[(g + 1) * 4.0**-width for width in STORED] for g in range(3)]
    table = [
        Measured((f"l{g}",), sizes[g], stage, int(stored), stored, errors[g][w])
        for g in range(3)
        for w, (stage, stored) in enumerate(zip(chosen.candidates(), STORED, strict=True))
    ]
    (walk,) = chosen.allocate(table)
    picked = [row for row in table if walk[row.layers[0]] == row.stage]
    total = budget * sum(sizes)
    assert sum(row.stored_bits * row.weights for row in picked) <= total
    least = min(
        sum(errors[g][w] for g, w in enumerate(choice))
        for choice in itertools.product(range(6), repeat=3)
        if sum(STORED[w] * sizes[g] for g, w in enumerate(choice)) <= total
    )
    assert sum(row.error for row in picked) == pytest.approx(least)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "widths": ("q4_k", "q6_k")}, "smallest of its widths, 4.5, got 4"),
        ({"bits": 5, "widths": ("q4_k", "q3_k")}, "must be a rising list"),
        ({"bits": 5, "widths": ("q4_k", 6)}, "of q2_k, q3_k, q4_k, q5_k, q6_k, 4, 5 and 8"),
        ({"bits": 5, "widths": ("q4_k", "q4_k")}, "must be a rising list"),
        ({"bits": 5, "widths": ("q4_k", "fp8")}, "must be a rising list"),
        ({"bits": 5, "widths": ("q4_k",), "group_size": 64}, "leave out 'group_size'"),
    ],
)
def test_k_quants_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(OrderError, match=message):
        method(Stage("mixed_precision", **options))


def test_rows_that_one_width_does_not_divide_are_refused():
    chosen = method(Stage("mixed_precision", bits=4, group_size=48, widths=(2, 4)))
    assert "group_size 48 does not divide" in chosen.check_shape((8, 64))
    chosen = method(Stage("mixed_precision", bits=5, widths=("q4_k", 8)))
    assert "q4_k has blocks of 256" in chosen.check_shape((8, 40))
    assert chosen.check_shape((8, 96)) is None


def test_nothing_is_pruned_after_grids_that_may_lack_zero():
    from optimum_order import JointCompressor

    assert not method(Stage("mixed_precision", bits=5, widths=("q4_k", 8))).makes_zero
    assert method(Stage("mixed_precision", bits=5, widths=("q3_k", "q6_k"))).makes_zero
    compressor = JointCompressor.from_pretrained("tiny-llama", calibration="builtin")
    order = "mixed_precision(bits=5, widths=[q4_k,8]) > magnitude:0.3"
    with pytest.raises(OrderError, match="cannot follow 'mixed_precision.*zero is not on its"):
        compressor.check_format(order, "gguf")
    pruned_first = "magnitude:0.3 > mixed_precision(bits=5, widths=[q4_k,8])"
    assert compressor.check_format(pruned_first, "gguf") == "gguf"


def test_a_k_quant_for_each_layer_is_written_code_for_code(tmp_path):
    """On tiny-llama: as many bytes as asked for, and better than one K-quant for all."""
    pytest.importorskip("gguf")
    from optimum_order import JointCompressor

    compressor = JointCompressor.from_pretrained(
        "tiny-llama", calibration="builtin", calibration_samples=8
    )
    widths = "[q2_k,q3_k,q4_k,q5_k,q6_k,8]"
    order = f"mixed_precision(bits=4.5, quantizer=rtn, fuse=false, widths={widths})"
    compressed = compressor.compress(order, format="gguf", progress=False)
    states = compressed.layers.values()
    weights = sum(state.weight.numel() for state in states)
    assert sum(s.stored_bits * s.weight.numel() for s in states) / weights <= 4.5
    assert len({s.grid.bits for s in states}) > 2
    assert compressed.save_pretrained(tmp_path / "out", "gguf") == "gguf"
    again = JointCompressor.from_pretrained(tmp_path / "out" / "model.gguf").source.states
    for name, state in compressed.layers.items():
        assert (again[name].weight == state.weight.float()).all() or (
            again[name].weight.to(state.weight.dtype) == state.weight
        ).all(), name
