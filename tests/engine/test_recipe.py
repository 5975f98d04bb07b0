"""An order is resolved once; whatever cannot be run is refused before anything is computed."""

import pytest

from optimum_order.backends import Backend
from optimum_order.engine import recipe as recipes
from optimum_order.engine.recipe import (
    Recipe,
    canonical,
    method,
    with_embedding,
    with_options,
)
from optimum_order.errors import DataError, OrderError
from optimum_order.models.units import find_units
from optimum_order.order import Order, Stage


@pytest.fixture
def units(make_model):
    return find_units(make_model("llama"))


def recipe(text, schedule="stage"):
    return Recipe.of(Order.parse(text), schedule)


class TestMethod:
    def test_reads_the_options_of_a_stage(self):
        backend = method(Stage("gptq", bits=4, group_size=16))
        assert isinstance(backend, Backend)
        assert (backend.options.bits, backend.options.group_size) == (4, 16)
        assert str(backend.stage) == "gptq(bits=4, group_size=16)"

    def test_of_an_allocator_has_its_candidates_resolved(self):
        allocator = method(Stage.parse("mixed_precision(bits=3, widths=[2,4], quantizer=rtn)"))
        backends = allocator.backends.values()
        assert [str(backend.stage) for backend in backends] == ["rtn:2", "rtn:4"]
        assert all(isinstance(backend, Backend) for backend in backends)

    def test_that_does_not_exist_is_refused_with_a_hint(self):
        with pytest.raises(OrderError, match=r"Unknown method 'wandaa'. Did you mean 'wanda'\?"):
            method(Stage("wandaa", 0.5))


class TestRecipe:
    def test_has_the_canonical_order(self):
        order = Order.parse("wanda(sparsity=0.5) > gptq(bits=4)")
        assert str(Recipe.of(order).order) == "wanda:0.5 > gptq:4"
        assert canonical(order) == Recipe.of(order).order
        assert Recipe.of(canonical(order)).order == canonical(order)

    def test_resolves_each_stage_once(self, monkeypatch, units):
        resolved = []
        original = recipes.method

        def counting(stage):
            resolved.append(str(stage))
            return original(stage)

        monkeypatch.setattr(recipes, "method", counting)
        made = recipe("wanda:0.5 > gptq:4 > magnitude:0.6", "block")
        made.check(units, calibrated=True)
        made.describe()
        assert made.needs_data
        assert [one for step in made.steps for one in step.methods] == list(made.methods)
        assert str(made.order) == "wanda:0.5 > gptq:4 > magnitude:0.6"
        assert resolved == ["wanda:0.5", "gptq:4", "magnitude:0.6"]

    def test_joins_backends_in_a_row_on_schedule_block(self):
        text = "wanda:0.5 > gptq:4 > mixed_precision:4.0 > rtn:3 > magnitude:0.6"
        assert [step.label for step in recipe(text).steps] == text.split(" > ")
        assert [step.label for step in recipe(text, "block").steps] == [
            "wanda:0.5 > gptq:4",
            "mixed_precision:4.0",
            "rtn:3 > magnitude:0.6",
        ]

    def test_refuses_an_unknown_schedule(self):
        message = r"Unknown schedule 'blok'\. Did you mean 'block'\? Allowed: block, stage\."
        with pytest.raises(OrderError, match=message):
            recipe("rtn:4", "blok")

    def test_describes_every_option(self):
        (described,) = recipe("gptq:4").describe()
        assert (described["stage"], described["method"]) == ("gptq:4", "gptq")
        assert described["options"]["group_size"] == "auto"
        assert "targets" not in described["options"]


class TestCheck:
    @pytest.mark.parametrize(
        ("order", "message"),
        [
            (
                "rtn:4 > wanda:1",
                "'sparsity' (fraction of weights removed) must be a number in [0, 1), got 1.",
            ),
            (
                "gptq(bits=4, group_size=20)",
                "Stage 'gptq(bits=4, group_size=20)' cannot compress "
                "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, "
                "model.layers.0.self_attn.v_proj and 9 more: group_size 20 does not divide its 32 "
                "inputs; 8, 16, 32 or -1 do.",
            ),
            (
                "rtn(bits=4, group_size=32)",
                "cannot compress model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj: "
                "group_size 32 does not divide its 48 inputs; 8, 12, 16, 24, 48 or -1 do.",
            ),
            (
                "mixed_precision(bits=4, group_size=20)",
                "group_size 20 does not divide its 32 inputs",
            ),
            (
                "rtn:4 > magnitude(pattern=3:5)",
                "pattern 3:5 needs a multiple of 5 inputs, it has 32",
            ),
        ],
    )
    def test_refuses_an_order_that_cannot_be_run(self, units, order, message):
        with pytest.raises(OrderError) as refusal:
            recipe(order).check(units, calibrated=True)
        assert message in str(refusal.value)

    @pytest.mark.parametrize(
        "stage", ["wanda:0.5", "sparsegpt:0.5", "gptq:4", "mixed_precision:4.0"]
    )
    def test_names_a_stage_that_needs_calibration(self, units, stage):
        made = recipe(f"magnitude:0.5 > {stage}")
        assert made.needs_data
        with pytest.raises(DataError, match=f"Stage '{stage}' needs calibration data"):
            made.check(units, calibrated=False)

    def test_refuses_to_prune_where_zero_may_be_off_the_grid(self, make_model):
        units = find_units(make_model("llama", hidden_size=64, intermediate_size=256))
        for order in (
            "rtn:q4_k > wanda:0.5",
            "rtn:q4_k > gptq:q5_k > magnitude:0.5",
            "magnitude(sparsity=0.1, targets=*.q_proj) > rtn:q2_k > wanda:0.5",
        ):
            with pytest.raises(OrderError, match=r"cannot follow .*: zero is not on its grid\."):
                recipe(order).check(units, calibrated=True)
        for order in (
            "wanda:0.5 > rtn:q4_k > wanda:0.6",
            "rtn(bits=q4_k, zero=true) > wanda:0.5",
            "rtn:q4_k > gptq:q3_k > magnitude:0.5",
            "rtn:q4_k > wanda(sparsity=0.5, off_grid=true)",
            "rtn(bits=q4_k, targets=*.q_proj) > wanda(sparsity=0.5, targets=*.k_proj)",
        ):
            recipe(order).check(units, calibrated=True)

    def test_lets_other_stages_do_without(self, units):
        made = recipe("magnitude:0.5 > rtn:4 > bitsandbytes:int8")
        assert not made.needs_data
        made.check(units, calibrated=False)

    def test_looks_at_the_shapes_of_covered_layers_only(self, units):
        covered = "rtn(bits=4, group_size=32, targets=*.{}_proj)"
        recipe(covered.format("up")).check(units, calibrated=False)
        with pytest.raises(OrderError, match="does not divide its 48 inputs"):
            recipe(covered.format("down")).check(units, calibrated=False)

    def test_refuses_targets_that_match_no_layer(self, units):
        message = (
            r"Stage 'rtn\(bits=4, targets=\*\.qq_proj\)': its targets match no layer\. Layers are "
            r"called, for example, 'model\.layers\.0\.self_attn\.q_proj'"
        )
        with pytest.raises(OrderError, match=message):
            recipe("rtn(bits=4, targets=*.qq_proj)").check(units, calibrated=False)

    def test_refuses_a_transform_behind_what_it_would_undo(self, plugins, units):
        recipe("permute > wanda:0.5").check(units, calibrated=True)
        for first in ("wanda:0.5", "rtn:4", "mixed_precision:4.0"):
            message = f"'permute:1.0' rewrites weights and cannot follow '{first}'.* Put it first"
            with pytest.raises(OrderError, match=message):
                recipe(f"{first} > permute").check(units, calibrated=True)


class TestTargets:
    def test_is_a_pattern_or_a_list_of_patterns(self):
        names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "qkv"]
        for text, expected in [
            ("gptq(bits=4, targets=*.q_proj)", names[::3]),
            ("gptq(bits=4, targets='re:.*[qk]_proj')", [n for n in names if "v_proj" not in n]),
            ("gptq(bits=4, targets=[*.0.*.q_proj,*.v_proj])", [names[0], names[2], names[5]]),
            ("gptq:4", names),
        ]:
            (stage,) = Order.parse(text)
            backend = method(stage)
            assert [name for name in names if backend.covers(name)] == expected
            assert str(backend.stage) == text
            assert Order.parse(str(backend.stage))[0] == stage

    def test_that_cannot_be_read_are_refused(self, units):
        with pytest.raises(OrderError, match=r"'re:\(' is not a regular expression"):
            recipe("rtn(bits=4, targets='re:(')").check(units, calibrated=False)
        with pytest.raises(OrderError, match="'targets' .* must be a pattern of layer names"):
            recipe("rtn(bits=4, targets=3)")


def test_options_go_to_the_stages_that_have_them():
    options = {"scales": "float16"}

    def given(order):
        return str(with_options(Order.parse(order), options))

    assert given("wanda:0.5 > gptq:4") == "wanda:0.5 > gptq(bits=4, scales=float16)"
    assert given("rtn(bits=4, group_size=32)") == "rtn(bits=4, group_size=32, scales=float16)"
    assert given("gptq:q4_k") == "gptq:q4_k", "its scales are float16 numbers anyway"
    assert given("mixed_precision(bits=4)") == "mixed_precision(bits=4.0, scales=float16)"
    assert given("ecsq:3") == "ecsq:3.0"
    again = given("gptq:4 > rtn:8")
    assert given(again) == again
    with pytest.raises(OrderError, match="Did you mean 'gptq'"):
        given("gtpq:4")


class TestEmbeddings:
    """What becomes of an embedding that no stage names."""

    def test_a_width_is_a_stage_of_its_own(self):
        order = with_embedding(Order("wanda:0.5 > gptq:4"), "8", "wte")
        assert str(order) == "wanda:0.5 > gptq:4 > rtn(bits=8, targets=wte)"

    def test_coded_ones_share_the_rate_of_the_last_stage_that_has_one(self):
        order = with_embedding(Order("ecsq:4 > wanda:0.2 > ecsq:2.5 > rtn:8"), "coded", "wte")
        assert str(order) == "ecsq:4.0 > wanda:0.2 > ecsq(rate=2.5, targets=[*,wte]) > rtn:8"
        assert Order(str(order)) == order
        named = with_embedding(Order("ecsq(rate=3, targets=*.up)"), "coded", "wte")
        assert str(named) == "ecsq(rate=3.0, targets=[*.up,wte])"

    def test_coded_ones_need_a_rate(self):
        with pytest.raises(OrderError, match=r"'gptq:4' has none.*--embeddings 8"):
            with_embedding(Order("gptq:4"), "coded", "wte")

    def test_are_covered_where_a_stage_names_them(self):
        for stage, expected in {
            "rtn:4": False,
            "rtn(bits=4, targets=*.up)": False,
            "rtn(bits=4, targets=*)": True,
        }.items():
            assert method(Stage.parse(stage)).covers("model.wte", "embedding") is expected


@pytest.mark.parametrize(
    ("order", "remarks"),
    [
        ("wanda:0.5 > wanda:0.3", ["'wanda:0.3' removes nothing after 'wanda:0.5': 50%"]),
        ("wanda:0.5 > gptq:4 > magnitude:0.5", ["'magnitude:0.5' removes nothing after"]),
        ("wanda(pattern=2:4) > wanda(pattern=2:4)", ["removes nothing after"]),
        ("gptq:4 > rtn:8", ["'rtn:8' gains nothing after 'gptq:4': the weights have values of 4"]),
        ("rtn:4 > rtn:4", ["gains nothing"]),
        ("gptq(bits=4, targets=*.q_proj) > rtn(bits=8, targets=*.q_proj)", ["gains nothing"]),
        ("rtn:4 > rtn(bits=8, targets=*.q_proj)", ["gains nothing"]),
        ("wanda:0.3 > wanda:0.5", []),
        ("wanda:0.5 > wanda(pattern=2:4)", []),
        ("gptq:4 > gptq:3", []),
        ("gptq:4 > wanda:0.5 > gptq:4", []),
        ("rtn(bits=4, targets=*.k_proj) > rtn(bits=8, targets=*.q_proj)", []),
        ("rtn(bits=4, targets=*.k_proj) > rtn:8", []),
        ("wanda:0.5 > gptq:4", []),
        ("ecsq:3 > gptq:4", []),
    ],
)
def test_a_stage_that_gains_nothing_is_remarked(units, order, remarks):
    found = recipe(order).remarks([target for unit in units for target in unit.targets])
    assert len(found) == len(remarks)
    assert all(start in text for start, text in zip(remarks, found, strict=True))
