import dataclasses
import itertools
import math

import pytest
import torch

from optimum_order.backends import Allocator, Backend, Recovery, Reshaper, Transform, option
from optimum_order.backends.base import KINDS, describe, needs_of
from optimum_order.engine.recipe import available, canonical, method
from optimum_order.errors import InvariantError, OrderError
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Drift, Gram, SquaredNorms, Statistics
from optimum_order.order import Order, Stage

# Two settings of every backend; mixed precision hands its layers to rtn or gptq.
SETTINGS = {
    "activations": ["activations:8", "activations(bits=fp8, per=tensor)"],
    "magnitude": ["magnitude:0.5", "magnitude(pattern=2:4)"],
    "wanda": ["wanda:0.3", "wanda(pattern=1:4)"],
    "sparsegpt": ["sparsegpt:0.6", "sparsegpt(pattern=2:4)"],
    "alps": ["alps:0.6", "alps(pattern=2:4)"],
    "rtn": ["rtn:2", "rtn(bits=8, group_size=16, symmetric=false)", "rtn:q5_k"],
    "ecsq": ["ecsq:4", "ecsq(rate=2, columns=false, max_code=7)"],
    "gptq": ["gptq:4", "gptq(bits=3, group_size=32, symmetric=false, act_order=false)", "gptq:fp8"],
    "bitsandbytes": ["bitsandbytes:nf4", "bitsandbytes:int8"],
}
STAGES = list(itertools.chain(*SETTINGS.values()))


def make(text):
    return method(Stage.parse(text))


def test_every_backend_has_settings_above():
    backends = {name: cls for name, cls in available().items() if issubclass(cls, Backend)}
    adapting = {name for name, cls in backends.items() if cls.kind == "adapt"}  # always last
    assert set(SETTINGS) == set(backends) - adapting and adapting == {"eora"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_either_order_of_any_two_keeps_every_promise(dtype, inputs, gaussian):
    """Also with a row and groups that were wholly removed beforehand."""
    weight = gaussian(32, 64, dtype=dtype)
    statistics = inputs("correlated", 128, 64)
    removed = torch.zeros_like(weight, dtype=torch.bool)
    removed[3] = True
    removed[5, 16:48] = True
    start = LayerState(weight.masked_fill(removed, 0.0), removed)
    for first in STAGES:
        middle = make(first).apply(start, statistics, where="here")
        for second in STAGES:
            end = make(second).apply(middle, statistics, where="here")
            for before, after, text in [(start, middle, first), (middle, end, second)]:
                case = f"{first} > {second}, after {text}"
                after.check(case)
                assert after.weight.dtype == dtype, case
                assert not (before.pruned & ~after.pruned).any(), case
                if make(text).kind == "quantize":
                    assert torch.equal(after.pruned, before.pruned), case
                    assert after.grid is not None, case
                else:
                    assert after.grid is before.grid, case
                if make(text).kind == "inputs":
                    assert after.weight is before.weight and after.inputs is not None, case
                else:
                    assert after.inputs is before.inputs, case
    assert torch.equal(start.weight, weight.masked_fill(removed, 0.0)), "changed in place"


def test_a_quantized_layer_is_pruned_on_its_grid_or_off_it_if_asked(inputs, gaussian):
    statistics = inputs("correlated", 128, 64)
    quantizers = ["rtn:4", "gptq:3", "bitsandbytes:nf4", "bitsandbytes:int8"]
    for quantizer, name in itertools.product(quantizers, ["magnitude", "wanda", "sparsegpt"]):
        case = f"{quantizer} > {name}"
        quantized = make(quantizer).apply(LayerState(gaussian(32, 64)), statistics)
        on = make(f"{name}:0.5").apply(quantized, statistics)
        assert on.grid is quantized.grid, case
        off = make(f"{name}(sparsity=0.5, off_grid=true)").apply(quantized, statistics)
        assert off.grid is None, case
        assert off.sparsity == on.sparsity, case
        third = make("wanda:0.7").apply(on, statistics)
        assert third.grid is quantized.grid, case


@dataclasses.dataclass(frozen=True)
class NoOptions:
    strength: float = option(1.0, "how broken it is")


class Broken(Backend):
    """Does what `breaking` says to a layer that was pruned and quantized."""

    name = "broken"
    summary = "breaks a promise"
    kind = "prune"
    Options = NoOptions

    def __init__(self, breaking, stage="broken"):
        super().__init__(Stage.parse(stage))
        self.breaking = breaking

    def compress(self, state, statistics):
        return self.breaking(state)


def changed(**changes):
    """A function that replaces some fields of a state."""
    return lambda state: dataclasses.replace(
        state, **{name: change(state) for name, change in changes.items()}
    )


def without_one(mask):
    mask = mask.clone()
    mask[tuple(mask.nonzero()[0])] = False
    return mask


BREAKS = {
    "revives a removed weight": (
        changed(weight=lambda s: s.weight.masked_fill(s.pruned, 0.5)),
        "pruned weights are no longer",
    ),
    "writes -0.0": (
        changed(weight=lambda s: s.weight.masked_fill(s.pruned, -0.0)),
        "pruned weights are no longer",
    ),
    "forgets the mask": (changed(pruned=lambda s: None), "brought pruned weights back"),
    "forgets one of the mask": (
        changed(pruned=lambda s: without_one(s.pruned)),
        "brought pruned weights back",
    ),
    "leaves the grid": (changed(weight=lambda s: s.weight * 1.001), "off its quantization grid"),
    "drops the grid": (changed(grid=lambda s: None), "dropped the quantization grid"),
    "returns NaN": (changed(weight=lambda s: s.weight * math.nan), "NaN or infinite"),
    "changes the dtype": (
        changed(weight=lambda s: s.weight.half()),
        "changed the weight's shape or dtype",
    ),
    "changes the shape": (
        lambda s: LayerState(s.weight[:, :-1], s.pruned[:, :-1]),
        "changed the weight's shape or dtype",
    ),
    "changes the grid's dtype": (
        changed(grid=lambda s: UniformGrid.fit(s.weight.half(), bits=4)),
        r"the grid is in torch\.float16",
    ),
}


@pytest.mark.parametrize("breaks", BREAKS)
def test_a_backend_that_breaks_a_promise_is_caught_and_the_layer_named(breaks, gaussian):
    state = make("rtn:4").apply(make("magnitude:0.5").apply(LayerState(gaussian())))
    breaking, message = BREAKS[breaks]
    where = "model.layers.3.q_proj"
    with pytest.raises(InvariantError, match=f"^{where}, stage 'broken:1.0': .*{message}"):
        Broken(breaking).apply(state, where=where)
    Broken(lambda s: s).apply(state, where="an honest backend passes")


def test_a_statistic_that_is_missing_is_named(gaussian):
    norms = Statistics(5, {SquaredNorms: torch.ones(32)})
    for text, statistics, name in [
        ("wanda:0.5", None, "SquaredNorms"),
        ("gptq:4", norms, "Gram"),
        ("sparsegpt:0.5", norms, "Gram"),
    ]:
        message = f"layer 7, stage '{text}': the backend needs {name} and was not given it"
        with pytest.raises(InvariantError, match=message):
            make(text).apply(LayerState(gaussian()), statistics, where="layer 7")


def test_a_backend_without_needs_is_given_no_statistics(gaussian):
    seen = []

    class Curious(Broken):
        def compress(self, state, statistics):
            seen.append(statistics)
            return state

    Curious(None).apply(LayerState(gaussian()))
    (statistics,) = seen
    assert statistics.tokens == 0 and not statistics.results


class TestOptions:
    def test_one_canonical_form(self):
        for text, printed in [
            ("wanda(sparsity=0.5)", "wanda:0.5"),
            ("wanda:0", "wanda:0.0"),
            ("wanda(sparsity=0.5, off_grid=false, pattern=none)", "wanda:0.5"),
            ("sparsegpt(damping=0.01, sparsity=0.5)", "sparsegpt:0.5"),
            ("sparsegpt(damping=0.1, sparsity=0.5)", "sparsegpt(damping=0.1, sparsity=0.5)"),
            ("magnitude(pattern=2:4, sparsity=0.5)", "magnitude(pattern=2:4)"),
            ("gptq(group_size=auto, bits=4)", "gptq:4"),
            ("mixed_precision(widths=[2,3,4,6,8], bits=4)", "mixed_precision:4.0"),
            ("bitsandbytes", "bitsandbytes:nf4"),
        ]:
            assert str(make(text).stage) == printed
            assert make(printed).stage == make(text).stage
            assert make(printed).options == make(text).options

    def test_a_whole_order_is_made_canonical(self):
        order = canonical(Order.parse("wanda(sparsity=0.5) > rtn(bits=4, clip=mse)"))
        assert str(order) == "wanda:0.5 > rtn:4"

    def test_resolved_names_every_option_but_targets_that_nobody_gave(self):
        backend = make("gptq:4")
        names = {field.name for field in dataclasses.fields(backend.options)}
        assert set(backend.resolved) == names - {"targets"}
        values = backend.resolved
        assert (values["bits"], values["group_size"], values["damping"]) == (4, "auto", 0.01)

    def test_an_error_says_what_is_allowed_and_what_was_given(self):
        for text, message in [
            (
                "wandaa:0.5",
                "Unknown method 'wandaa'. Did you mean 'wanda'? Allowed: activations, alps,",
            ),
            (
                "gptq(bit=4)",
                "Stage 'gptq(bit=4)': Unknown option 'bit'. Did you mean 'bits'? Allowed: act_ord",
            ),
            (
                "gptq(bits=4, act_order=1)",
                "'act_order' (visit the columns with the largest inputs first) must be true or",
            ),
            ("gptq(bits=4, act_order=yes)", "must be true or false, got 'yes'"),
            ("rtn(bits=4, symmetric=0)", "must be true or false, got 0"),
            ("sparsegpt(sparsity=0.5, damping=true)", "got True"),
            ("mixed_precision(bits=4, widths=2)", "got 2"),
        ]:
            with pytest.raises(OrderError) as caught:
                make(text)
            assert message in str(caught.value)

    def test_every_option_of_every_method_is_described(self):
        for cls in available().values():
            for field in dataclasses.fields(cls.Options):
                assert field.metadata["help"]

    def test_types_have_names(self):
        assert describe(int | str) == "an integer or a word"
        assert describe(tuple[int, ...]) == describe(tuple) == "a list"


class TestTargets:
    """The option that every method has."""

    def test_all_layers_are_covered_if_no_pattern_is_given(self):
        for text in [*STAGES, "mixed_precision:4"]:
            backend = make(text)
            assert backend.targets == ()
            assert backend.covers("any.layer")
            assert "targets" not in backend.resolved
            assert "targets" not in str(backend.stage)

    def test_a_pattern_chooses_layers_by_their_full_name(self):
        for pattern in ("*.0.*.q_proj", "'re:model.layers.0.+q_proj'"):
            backend = make(f"gptq(bits=3, targets={pattern})")
            assert backend.targets == (pattern.strip("'"),)
            assert backend.covers("model.layers.0.self_attn.q_proj")
            assert not backend.covers("model.layers.0.self_attn.k_proj")
            assert not backend.covers("model.layers.1.self_attn.q_proj")
            assert backend.resolved["targets"] == pattern.strip("'")
            assert str(backend.stage) == f"gptq(bits=3, targets={pattern})"
        assert not backend.covers("my.model.layers.0.self_attn.q_proj"), "the whole name counts"

    def test_a_list_covers_the_layers_of_each_pattern(self):
        backend = make("wanda(sparsity=0.5, targets=[*.q,a.k])")
        assert backend.targets == ("*.q", "a.k")
        covered = [name for name in ("a.q", "b.q", "a.k", "b.k") if backend.covers(name)]
        assert covered == ["a.q", "b.q", "a.k"]
        assert str(backend.stage) == "wanda(sparsity=0.5, targets=[*.q,a.k])"
        assert make(str(backend.stage)).stage == backend.stage

    def test_a_list_of_one_is_the_pattern(self):
        assert make("rtn(bits=4, targets=[a.q])").stage == make("rtn(bits=4, targets=a.q)").stage

    def test_targets_have_to_be_patterns(self):
        for targets in ["3", "true", "[]", "[1]", "[a,[b]]"]:
            with pytest.raises(OrderError, match=r"'targets' .* must be a pattern of layer names"):
                make(f"rtn(bits=4, targets={targets})")

    def test_a_pattern_that_cannot_be_read_is_refused(self):
        with pytest.raises(OrderError, match=r"'re:\(' is not a regular expression after 're:'"):
            make("rtn(bits=4, targets='re:(')").covers("a")


@dataclasses.dataclass(frozen=True)
class Plain:
    strength: float = 1.0


@dataclasses.dataclass
class Thawed:
    strength: float = option(1.0, "how strong")


def define(base=Backend, **members):
    """Define a method class with these members."""
    defaults = {"name": "a", "summary": "b", "kind": "prune", "Options": NoOptions}
    return type("Custom", (base,), defaults | {"__module__": __name__} | members)


class TestClassDefinition:
    def test_a_class_that_keeps_the_rules_is_defined(self):
        cls = define(needs=frozenset({Gram}))
        assert dataclasses.fields(cls.Options)[0].name == "strength", "the main knob stays first"
        assert issubclass(cls.Options, NoOptions)
        assert cls.Options(2.0).targets is None

    def test_a_class_that_breaks_them_is_refused(self):
        for members, message in [
            (
                {"kind": "prnue"},
                "Unknown kind 'prnue'. Did you mean 'prune'? Allowed: adapt, inputs, prune,",
            ),
            ({"kind": None}, "Unknown kind 'None'"),
            ({"needs": frozenset({"absmax"})}, "'needs' must be a frozenset of accumulator class"),
            ({"needs": {"absmax"}}, "got {'absmax'}"),
            ({"needs": {Gram}}, "'needs' must be a frozenset of accumulator classes"),
            ({"needs": frozenset({int})}, "optimum_order.layers.statistics.Gram, got frozenset"),
            ({"Options": dict}, "'Options' must be a frozen dataclass, got <class 'dict'>"),
            ({"Options": Thawed}, "'Options' must be a frozen dataclass"),
            ({"Options": NoOptions()}, "'Options' must be a frozen dataclass"),
            ({"Options": Plain}, "the option 'strength' must be made with option()"),
        ]:
            with pytest.raises(TypeError) as caught:
                define(**members)
            assert str(caught.value).startswith(f"The method class {__name__}.Custom: ")
            assert message in str(caught.value)

    def test_options_have_to_be_declared(self):
        with pytest.raises(TypeError, match="Custom must declare 'Options', a frozen dataclass"):
            type("Custom", (Backend,), {"name": "a", "summary": "b", "kind": "prune"})

    def test_a_class_without_a_name_may_leave_everything_open(self):
        type("Base", (Backend,), {})
        with pytest.raises(TypeError, match="Unknown kind 'prnue'"):
            type("Base", (Backend,), {"kind": "prnue"})

    def test_each_base_has_its_own_kinds(self):
        bases = {"allocate": Allocator, "reshape": Reshaper, "transform": Transform}
        bases |= {"recover": Recovery, "prune": Backend, "quantize": Backend, "inputs": Backend}
        bases |= {"adapt": Backend}
        assert set(bases) == set(KINDS)
        for kind, base in bases.items():
            assert define(base, kind=kind).kind == kind
            wrong = "transform" if kind != "transform" else "prune"
            with pytest.raises(TypeError, match=f"Unknown kind '{wrong}'"):
                define(base, kind=wrong)

    def test_targets_are_added_once(self):
        class Child(define(Options=NoOptions)):
            name = "child"

            @dataclasses.dataclass(frozen=True)
            class Options(Broken.Options):
                more: int = option(1, "more")

        names = [field.name for field in dataclasses.fields(Child.Options)]
        assert names == ["strength", "targets", "more"]


class Recorder:
    """An engine that writes down which verb was called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, verb):
        return lambda *arguments: self.calls.append((verb, *arguments))


class TestRun:
    def test_backends_that_share_a_walk_are_applied_together(self):
        engine = Recorder()
        backends = (make("wanda:0.5"), make("gptq:4"))
        assert all(backend.joins for backend in backends)
        backends[0].run(engine, backends)
        assert engine.calls == [("apply", backends)]

    def test_an_allocator_has_its_choice_assigned_walk_by_walk(self):
        allocator = make("mixed_precision(bits=4, widths=[2,4], quantizer=rtn)")
        assert set(allocator.backends) == set(allocator.candidates())
        assert not allocator.joins
        narrow, wide = allocator.candidates()
        allocator.allocate = lambda table: [{"a": narrow}, {"b": wide, "c": wide}]
        engine = Recorder()
        allocator.run(engine, (allocator,))
        assert [call[0] for call in engine.calls] == ["measure", "assign", "assign"]
        assert engine.calls[1][1:] == ({"a": allocator.backends[narrow]}, allocator)
        assert list(engine.calls[2][1]) == ["b", "c"]

    def test_an_allocator_cannot_name_another(self):
        class Nested(available()["mixed_precision"]):
            name = "nested"

            def candidates(self):
                return [Stage("mixed_precision", 4)]

        with pytest.raises(OrderError, match=r"'nested:4\.0' cannot allocate 'mixed_precision:4'"):
            Nested(Stage("nested", 4)).bind(method)

    def test_whole_model_methods_call_their_own_verb(self):
        for base, verb, hooks in [
            (Reshaper, "reshape", ("cuts", "sizes")),
            (Transform, "transform", ("transform",)),
            (Recovery, "recover", ("recover",)),
        ]:
            hooks = {hook: lambda *arguments: None for hook in hooks}
            whole = define(base, kind=base.kind, **hooks)(Stage("a"))
            engine = Recorder()
            whole.run(engine, (whole,))
            assert engine.calls == [(verb, whole)]
            assert not whole.joins
            assert whole.needs_data is (base is not Reshaper), "they are given batches"

    def test_the_needs_of_several_are_all_of_theirs(self):
        backends = [make("wanda:0.5"), make("gptq:4"), make("rtn:4")]
        assert needs_of(backends) == {SquaredNorms, Gram, Drift}
        assert [backend.needs_data for backend in backends] == [True, True, False]
