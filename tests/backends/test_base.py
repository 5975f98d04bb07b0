import dataclasses
import itertools
import math

import pytest
import torch

from optimum_order.backends import Allocator, Backend, Method, option
from optimum_order.engine.recipe import available, canonical, method
from optimum_order.errors import InvariantError, OrderError
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics
from optimum_order.order import Order, Stage

# Two settings of every backend there is; mixed precision hands its layers to rtn or gptq.
SETTINGS = {
    "magnitude": ["magnitude:0.5", "magnitude(pattern=2:4)"],
    "wanda": ["wanda:0.3", "wanda(pattern=1:4)"],
    "sparsegpt": ["sparsegpt:0.6", "sparsegpt(pattern=2:4)"],
    "rtn": ["rtn:2", "rtn(bits=8, group_size=16, symmetric=false)"],
    "gptq": ["gptq:4", "gptq(bits=3, group_size=32, symmetric=false, act_order=false)"],
    "bitsandbytes": ["bitsandbytes:nf4", "bitsandbytes:int8"],
}
STAGES = list(itertools.chain(*SETTINGS.values()))


def stage(text):
    return method(Stage.parse(text))


def test_every_backend_has_settings_below():
    assert set(SETTINGS) == {name for name, cls in available().items() if issubclass(cls, Backend)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", STAGES)
def test_either_order_of_any_two_keeps_every_promise(first, dtype, inputs, gaussian):
    """Also with a row and groups that were wholly removed beforehand."""
    weight, statistics = gaussian(32, 64, dtype=dtype), inputs("correlated", 128, 64)
    removed = torch.zeros_like(weight, dtype=torch.bool)
    removed[3] = True
    removed[5, 16:48] = True
    start = LayerState(weight.masked_fill(removed, 0.0), removed)
    one = stage(first).apply(start, statistics, where="here")
    for second in STAGES:
        two = stage(second).apply(one, statistics, where="here")
        for before, after, backend in [(start, one, stage(first)), (one, two, stage(second))]:
            after.check("here")
            assert after.weight.dtype == dtype
            assert not (before.pruned & ~after.pruned).any()
            if backend.kind == "quantize":
                assert torch.equal(after.pruned, before.pruned)
                assert after.grid is not None
            else:
                assert after.grid is before.grid
        assert torch.equal(
            start.weight, weight.masked_fill(removed, 0.0)
        )  # nobody writes into what it was given


@pytest.mark.parametrize("pruner", ["magnitude:0.5", "wanda:0.5", "sparsegpt:0.5"])
@pytest.mark.parametrize("quantiser", ["rtn:4", "gptq:3", "bitsandbytes:nf4", "bitsandbytes:int8"])
def test_a_quantised_layer_is_pruned_on_its_grid_or_off_it_if_asked(
    quantiser, pruner, inputs, gaussian
):
    statistics = inputs("correlated", 128, 64)
    quantised = stage(quantiser).apply(LayerState(gaussian(32, 64)), statistics)
    on = stage(pruner).apply(quantised, statistics)
    assert on.grid is quantised.grid
    name, sparsity = pruner.split(":")
    off = stage(f"{name}(sparsity={sparsity}, off_grid=true)").apply(quantised, statistics)
    assert off.grid is None
    assert off.sparsity == on.sparsity
    third = stage("wanda:0.7").apply(on, statistics)
    assert third.grid is quantised.grid


@pytest.mark.parametrize("text", STAGES)
def test_a_wholly_removed_layer_stays_so(text, inputs, gaussian):
    state = LayerState(torch.zeros(32, 64), torch.ones(32, 64, dtype=torch.bool))
    after = stage(text).apply(state, inputs("correlated", 128, 64))
    assert not after.weight.any()
    assert after.pruned.all()


@pytest.mark.parametrize("text", [text for text in STAGES if stage(text).needs])
def test_a_layer_that_no_token_reached_is_treated_by_a_rule_that_needs_none(text, inputs, gaussian):
    statistics = Statistics(0, {Gram: torch.zeros(64, 64)})
    after = stage(text).apply(LayerState(gaussian(32, 64)), statistics)
    white = Statistics(1, {Gram: torch.eye(64)})
    expected = stage(text).apply(LayerState(gaussian(32, 64)), white)
    assert torch.equal(after.weight, expected.weight)
    note = f"{stage(text).stage}: no calibration token reached this layer; its inputs were taken as white noise"
    assert after.notes == (note, *expected.notes)


@pytest.mark.parametrize("text", [text for text in STAGES if not stage(text).needs])
def test_a_backend_without_needs_asks_for_nothing(text, gaussian):
    assert stage(text).apply(LayerState(gaussian(32, 64)), None).notes == ()


@pytest.mark.parametrize("text", [text for text in STAGES if stage(text).needs])
def test_a_backend_is_not_run_without_what_it_needs(text, gaussian):
    known = (
        [None]
        if "gram" not in stage(text).needs
        else [None, Statistics(5, {SquaredNorms: torch.ones(64)})]
    )
    for statistics in known:
        with pytest.raises(
            InvariantError, match=r"layer 7, stage .* needs \[.*\] and was not given them"
        ):
            stage(text).apply(LayerState(gaussian(32, 64)), statistics, where="layer 7")


@dataclasses.dataclass(frozen=True)
class NoOptions:
    strength: float = option(1.0, "how broken it is")


class Broken(Backend):
    """Does what `breaking` says to a layer that was pruned and quantised."""

    name = "broken"
    summary = "breaks a promise"
    kind = "prune"
    Options = NoOptions

    def __init__(self, breaking):
        super().__init__(Stage("broken"))
        self.breaking = breaking

    def compress(self, state, statistics):
        return self.breaking(state)


def revive(state):
    return dataclasses.replace(state, weight=state.weight.masked_fill(state.pruned, 0.5))


def write_negative_zero(state):
    return dataclasses.replace(state, weight=state.weight.masked_fill(state.pruned, -0.0))


def shrink_mask(state):
    pruned = state.pruned.clone()
    pruned[tuple(pruned.nonzero()[0])] = False
    return dataclasses.replace(state, pruned=pruned)


def change_shape(state):
    return LayerState(state.weight[:, :-1], state.pruned[:, :-1])


BREAKS = {
    "revives a removed weight": (revive, "pruned weights are no longer"),
    "writes -0.0": (write_negative_zero, "pruned weights are no longer"),
    "forgets the mask": (
        lambda s: dataclasses.replace(s, pruned=None),
        "brought pruned weights back",
    ),
    "forgets one of the mask": (shrink_mask, "brought pruned weights back"),
    "leaves the grid": (
        lambda s: dataclasses.replace(s, weight=s.weight * 1.001),
        "off its quantisation grid",
    ),
    "drops the grid": (
        lambda s: dataclasses.replace(s, grid=None),
        "dropped the quantisation grid",
    ),
    "returns NaN": (
        lambda s: dataclasses.replace(s, weight=s.weight * math.nan),
        "NaN or infinite",
    ),
    "changes the dtype": (
        lambda s: dataclasses.replace(s, weight=s.weight.half()),
        "changed the weight's shape or dtype",
    ),
    "changes the shape": (change_shape, "changed the weight's shape or dtype"),
    "changes the grid's dtype": (
        lambda s: dataclasses.replace(s, grid=UniformGrid.fit(s.weight.half(), bits=4)),
        r"the grid is in torch\.float16",
    ),
}


@pytest.mark.parametrize("breaks", BREAKS)
def test_a_backend_that_breaks_a_promise_is_caught_and_the_layer_named(breaks, gaussian):
    state = stage("rtn:4").apply(stage("magnitude:0.5").apply(LayerState(gaussian())))
    breaking, message = BREAKS[breaks]
    with pytest.raises(
        InvariantError, match=f"^model.layers.3.q_proj, stage 'broken:1.0': .*{message}"
    ):
        Broken(breaking).apply(state, where="model.layers.3.q_proj")
    Broken(lambda s: s).apply(state, where="an honest one passes")


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "printed"),
        [
            ("wanda(sparsity=0.5)", "wanda:0.5"),
            ("wanda:0", "wanda:0.0"),
            ("wanda(sparsity=0.5, off_grid=false, pattern=none)", "wanda:0.5"),
            ("sparsegpt(damping=0.01, sparsity=0.5)", "sparsegpt:0.5"),
            ("sparsegpt(damping=0.1, sparsity=0.5)", "sparsegpt(damping=0.1, sparsity=0.5)"),
            ("magnitude(pattern=2:4, sparsity=0.5)", "magnitude(pattern=2:4)"),
            ("gptq(group_size=auto, bits=4)", "gptq:4"),
            ("mixed_precision(widths=[2,3,4,6,8], bits=4)", "mixed_precision:4.0"),
            ("bitsandbytes", "bitsandbytes:nf4"),
        ],
    )
    def test_one_canonical_form(self, text, printed):
        assert str(stage(text).stage) == printed
        assert stage(printed).stage == stage(text).stage
        assert stage(printed).options == stage(text).options

    def test_a_whole_order_is_made_canonical(self):
        order = canonical(Order.parse("wanda(sparsity=0.5) > rtn(bits=4, clip=mse)"))
        assert str(order) == "wanda:0.5 > rtn:4"

    def test_resolved_names_every_option(self):
        resolved = stage("gptq:4").resolved
        assert set(resolved) == {
            field.name for field in dataclasses.fields(stage("gptq:4").options)
        }
        assert (resolved["bits"], resolved["group_size"], resolved["damping"]) == (4, "auto", 0.01)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "wandaa:0.5",
                "Unknown method 'wandaa'. Did you mean 'wanda'? Allowed: bitsandbytes, gptq, magnitude",
            ),
            (
                "gptq(bit=4)",
                "Stage 'gptq(bit=4)': Unknown option 'bit'. Did you mean 'bits'? Allowed: act_order,",
            ),
            (
                "gptq(bits=4, act_order=1)",
                "'act_order' (visit the columns with the largest inputs first) must be true or",
            ),
            ("gptq(bits=4, act_order=yes)", "must be true or false, got 'yes'"),
            ("rtn(bits=4, symmetric=0)", "must be true or false, got 0"),
            ("sparsegpt(sparsity=0.5, damping=true)", "got True"),
            ("mixed_precision(bits=4, widths=2)", "got 2"),
        ],
    )
    def test_an_error_says_what_is_allowed_and_what_was_got(self, text, message):
        with pytest.raises(OrderError) as caught:
            stage(text)
        assert message in str(caught.value)

    def test_every_option_of_every_method_is_described(self):
        for cls in available().values():
            assert issubclass(cls, Method)
            for field in dataclasses.fields(cls.Options):
                assert field.metadata["help"]

    def test_a_method_is_a_backend_or_an_allocator(self):
        for cls in available().values():
            assert issubclass(cls, (Backend, Allocator))
            if issubclass(cls, Backend):
                assert cls.kind in ("prune", "quantize")
                assert cls.needs <= {"squared_norms", "gram"}
