"""A reshaper, transform or recovery that breaks a promise is refused, and its layer or stage named."""

import dataclasses

import pytest
import torch

from optimum_order.backends import Recovery, Reshaper, Transform
from optimum_order.backends.base import Cut
from optimum_order.calibration.execution import Execution
from optimum_order.engine.recipe import Recipe, method
from optimum_order.engine.run import Subject, run
from optimum_order.errors import InvariantError, OrderError
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.statistics import SquaredNorms
from optimum_order.models.units import find_units
from optimum_order.order import Order, Stage


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """None."""


@pytest.fixture
def compress(make_model, batches):
    """`compress(order, whole)`: a llama after an order and a method; the methods' own classes."""

    def make(order, whole):
        model = make_model("llama")
        subject = Subject(model, find_units(model), batches, lambda: make_model("llama"))
        methods = [method(stage) for stage in Order.parse(order)] if order else []
        recipe = Recipe((*methods, whole))
        recipe.check(subject.units, calibrated=True)
        return model, run(subject, recipe, Execution())

    return make


class Scale(Transform):
    name = "scale"
    summary = "multiply the last norm"
    Options = NoOptions

    def __init__(self, factor):
        super().__init__(Stage("scale"))
        self.factor = factor

    def transform(self, model):
        model.model.norm.weight.data *= self.factor


class TestTransform:
    def test_the_same_function_passes(self, compress):
        model, result = compress("", Scale(1 + 1e-6))
        assert str(result.order) == "scale"
        for name, state in result.states.items():
            assert torch.equal(state.weight, model.get_submodule(name).weight)

    def test_another_function_is_refused(self, compress):
        message = "Stage 'scale' changed an output by 0.01 of the largest, more than 0.001"
        with pytest.raises(InvariantError, match=message):
            compress("", Scale(1.01))

    def test_no_number_is_another_function(self, compress):
        with pytest.raises(InvariantError, match="changed an output by nan"):
            compress("", Scale(float("nan")))

    def test_compressed_weights_are_not_rewritten(self, compress):
        message = "'scale' rewrites all weights and cannot follow 'rtn:4'.* Put it first"
        with pytest.raises(OrderError, match=message):
            compress("rtn:4", Scale(1.0))


class Trim(Reshaper):
    name = "trim"
    summary = "cut the MLPs"
    Options = NoOptions
    needs = frozenset({SquaredNorms})

    def __init__(self, indices, layers=("gate", "up", "down")):
        super().__init__(Stage("trim"))
        self.indices = torch.tensor(indices)
        self.layers = layers
        self.seen = []

    def cuts(self, block, states, statistics):
        self.seen.append((block, sorted(states), sorted(statistics)))
        assert all(SquaredNorms in gathered for gathered in statistics.values())
        return [
            Cut(f"{block}.mlp.{layer}_proj", int(layer == "down"), self.indices)
            for layer in self.layers
        ]

    def configure(self, config):
        config.intermediate_size = len(self.indices)


class TestReshaper:
    def test_rows_and_columns_are_cut_with_mask_and_grid(self, compress):
        order = [5, 3, 40, 41]
        whole = Trim(order)
        model, result = compress("wanda:0.5 > rtn(bits=4, group_size=-1)", whole)
        plain, _ = compress("wanda:0.5", method(Stage.parse("rtn(bits=4, group_size=-1)")))
        assert model.config.intermediate_size == 4
        for number in (0, 1):
            mlp, before = (m.model.layers[number].mlp for m in (model, plain))
            assert torch.equal(mlp.up_proj.weight, before.up_proj.weight[order])
            assert torch.equal(mlp.down_proj.weight, before.down_proj.weight[:, order])
            assert (mlp.up_proj.out_features, mlp.down_proj.in_features) == (4, 4)
            for layer in ("up_proj", "down_proj"):
                state = result.states[f"model.layers.{number}.mlp.{layer}"]
                state.check(layer)
                assert state.pruned.shape == state.weight.shape
                assert torch.equal(state.weight, mlp.get_submodule(layer).weight)

    def test_the_statistics_of_every_layer_are_there(self, compress):
        whole = Trim([0, 1])
        _, result = compress("", whole)
        assert [block for block, _, _ in whole.seen] == ["model.layers.0", "model.layers.1"]
        for block, states, statistics in whole.seen:
            layers = sorted(name for name in result.states if name.startswith(block))
            assert states == statistics == layers

    def test_the_part_that_was_removed_is_recorded(self, compress):
        _, result = compress("", Trim(list(range(48))))
        _, half = compress("", Trim(list(range(24))))
        for name, records in half.records.items():
            assert len(records) == int("mlp" in name)
        (record,) = half.records["model.layers.0.mlp.up_proj"]
        assert record.stage == "trim" and 0.3 < record.relative_error < 0.7
        (whole,) = result.records["model.layers.0.mlp.up_proj"]
        assert whole.relative_error == 0.0

    def test_indices_that_do_not_fit_are_refused(self, compress):
        for indices in ([], [48], [[0, 1]]):
            with pytest.raises(
                InvariantError, match=r"mlp.gate_proj' along axis 0 must name 1 to 48"
            ):
                compress("", Trim(indices))

    def test_a_grid_that_breaks_is_refused(self, compress):
        message = "'trim' breaks the grid of '.*down_proj': .*breaks group 0.*Put it before"
        with pytest.raises(OrderError, match=message):
            compress("rtn(bits=4, group_size=16)", Trim([0, 1, 2]))


class Change(Recovery):
    name = "change"
    summary = "change the layers"
    Options = NoOptions

    def __init__(self, change):
        super().__init__(Stage("change"))
        self.change = change
        self.seen = None

    def recover(self, model, states, batches, teacher):
        self.seen = (model, dict(states), batches, teacher)
        name = "model.layers.0.mlp.up_proj"
        return {name: self.change(states[name])}


def scaled(state, factor=1.1):
    grid = dataclasses.replace(state.grid, scale=state.grid.scale * factor)
    weight = grid.dequantize(state.grid.quantize(state.weight))
    return dataclasses.replace(state, weight=weight, grid=grid)


class TestRecovery:
    def test_a_layer_may_change_on_its_mask_and_codes(self, compress, make_model, batches):
        whole = Change(scaled)
        model, result = compress("wanda:0.5 > rtn:4", whole)
        state = result.states["model.layers.0.mlp.up_proj"]
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, state.weight)
        record = result.records["model.layers.0.mlp.up_proj"][-1]
        assert record.stage == "change" and record.relative_error == pytest.approx(0.01, rel=1e-3)
        assert len(result.records["model.layers.0.mlp.down_proj"]) == 2
        _, states, seen, teacher = whole.seen
        assert states.keys() == result.states.keys() and seen == batches
        for name, parameter in make_model("llama").named_parameters():
            assert torch.equal(parameter, teacher.get_parameter(name))

    def test_a_broken_promise_is_refused(self, compress):
        def revive(state):
            pruned = torch.zeros_like(state.pruned)
            return dataclasses.replace(state, pruned=pruned)

        def move(state):
            return dataclasses.replace(state, weight=state.weight.roll(1, 0))

        def leave(state):
            return dataclasses.replace(state, grid=None)

        def coarsen(state):
            grid = UniformGrid.fit(state.weight, bits=2)
            return dataclasses.replace(state, weight=grid.nearest(state.weight), grid=grid)

        def shift(state):
            return dataclasses.replace(state, weight=state.weight * 1.01)

        for change, message in [
            (revive, "the recovery changed the mask"),
            (move, "the recovery changed the layer's codes"),
            (leave, "the recovery dropped or made a grid"),
            (coarsen, "the recovery changed the layer's codes"),
            (shift, "a weight is off its quantization grid"),
        ]:
            where = r"^model\.layers\.0\.mlp\.up_proj, stage 'change': "
            with pytest.raises(InvariantError, match=where + message):
                compress("magnitude(sparsity=0.5, per=row) > rtn:4", Change(change))
