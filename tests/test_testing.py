"""A contract suite passes an honest class, and fails a class that breaks one of its promises."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_order import testing
from optimum_order.backends.base import option
from optimum_order.backends.selection import Pruner, PruningOptions, lowest, remove
from optimum_order.backends.uniform import UniformQuantizer
from optimum_order.evaluation import Metric, Windows
from optimum_order.evaluation.perplexity import Perplexity
from optimum_order.layers.grids.base import ALL
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.statistics import Accumulator, SquaredNorms, Statistics


def failures(suite):
    """The names of the tests that fail, without their "test_"."""
    names = set()
    for name in dir(suite):
        if name.startswith("test_"):
            try:
                getattr(suite(), name)()
            except Exception:
                names.add(name.removeprefix("test_"))
    return names


def test_values_are_compared_bit_for_bit():
    grid = UniformGrid.fit(testing.gaussian(2, 8), bits=4)
    assert testing.same(grid, dataclasses.replace(grid))
    assert not testing.same(grid, dataclasses.replace(grid, bits=5))
    assert not testing.same(grid, dataclasses.replace(grid, scale=grid.scale * 1.0001))
    assert not testing.same(grid, dataclasses.replace(grid, scale=grid.scale.T))
    assert not testing.same(grid, dataclasses.replace(grid, zero_point=grid.scale))
    assert not testing.same(torch.tensor(0.0), torch.tensor(-0.0))
    assert not testing.same([torch.ones(1)], (torch.ones(1),))


def test_no_suite_is_collected_by_itself():
    suites = [value for name, value in vars(testing).items() if name.endswith("Contract")]
    assert len(suites) >= 3
    for suite in suites:
        assert not suite.__name__.startswith("Test"), "pytest would run it"
        assert any(name.startswith("test_") for name in dir(suite))


# --- grids ------------------------------------------------------------------------------------


def suite_of(grid_class):
    """The suite of a grid that is fitted as a `UniformGrid` is."""

    class Suite(testing.GridContract):
        inputs = 16

        def grids(self, weight):
            yield grid_class.fit(weight, bits=4, group_size=8, symmetric=False)

    return Suite


class Broken(UniformGrid):
    """Fitted as itself."""

    @classmethod
    def fit(cls, weight, **options):
        grid = UniformGrid.fit(weight, **options)
        return cls(grid.bits, grid.scale, grid.zero_point, grid.inputs)


class NoZero(Broken):
    def dequantize(self, codes, columns=ALL):
        values = super().dequantize(codes, columns)
        return torch.where(values == 0, 1e-3, values).to(values.dtype)

    def nearest(self, weight, columns=ALL):
        return self.dequantize(self.quantize(weight, columns), columns)


class MinusZero(Broken):
    def nearest(self, weight, columns=ALL):
        values = super().nearest(weight, columns)
        return torch.where(values == 0, -0.0, values).to(values.dtype)


class Floors(Broken):
    def quantize(self, weight, columns=ALL):
        return (super().quantize(weight, columns) - 1).clamp(min=0)

    def nearest(self, weight, columns=ALL):
        return self.dequantize(self.quantize(weight, columns), columns)


class HoldsAll(Broken):
    def holds(self, weight):
        return True


class WrongRounder(Broken):
    def rounder(self, columns):
        return super().rounder(columns.flip(0))


class ForgetsColumns(Broken):
    def quantize(self, weight, columns=ALL):
        return super().quantize(weight, slice(0, weight.shape[1]))


class WideCodes(Broken):
    def quantize(self, weight, columns=ALL):
        return super().quantize(weight, columns).int()


class TakesAll(Broken):
    def take(self, rows=ALL, columns=ALL):
        return dataclasses.replace(super().take(ALL, columns))


class TakesParts(Broken):
    """Gives the scale of the first weight to all of a new group."""

    def take(self, rows=ALL, columns=ALL):
        group = self._group[columns][:: self.unit]
        scale, zero = self.scale[rows][:, group], self.zero_point[rows][:, group]
        width = len(self._group[columns])
        return dataclasses.replace(self, scale=scale, zero_point=zero, inputs=width)


class StacksBackwards(Broken):
    @classmethod
    def concat(cls, grids):
        return super().concat(list(grids)[::-1])


class StacksAnything(Broken):
    @classmethod
    def concat(cls, grids):
        zeros = torch.cat([grid.zero_point for grid in grids])
        scale = torch.cat([grid.scale.to(grids[0].dtype) for grid in grids])
        return dataclasses.replace(grids[0], scale=scale, zero_point=zeros)


class LikeItself(Broken):
    def like(self, rows, inputs):
        return self


class HidesTensors(Broken):
    """Moves without its scales: they are no fields."""

    @classmethod
    def fit(cls, weight, **options):
        grid = super().fit(weight, **options)
        object.__setattr__(grid, "hidden", grid.scale)
        object.__setattr__(grid, "scale", None)
        object.__setattr__(grid, "zero_point", None)
        return grid


def test_an_honest_grid_passes():
    assert failures(suite_of(UniformGrid)) == failures(suite_of(Broken)) == set()


@pytest.mark.parametrize(
    ("grid_class", "promise"),
    [
        (HidesTensors, "a_grid_is_a_frozen_dataclass_with_its_tensors_as_fields"),
        (NoZero, "zero_is_on_the_grid"),
        (MinusZero, "zero_is_on_the_grid"),
        (Floors, "nearest_values_are_finite_and_on_the_grid"),
        (Floors, "no_other_code_is_nearer"),
        (HoldsAll, "a_weight_off_the_grid_is_not_held"),
        (WrongRounder, "the_rounder_of_a_sweep_gives_the_nearest_values"),
        (ForgetsColumns, "columns_are_rounded_as_in_the_whole_weight"),
        (WideCodes, "codes_stand_for_values"),
        (TakesAll, "a_part_has_the_values_of_the_whole"),
        (TakesParts, "a_part_that_separates_weights_of_one_scale_is_refused"),
        (StacksBackwards, "parts_stack_to_the_whole"),
        (StacksAnything, "grids_that_do_not_agree_are_not_stacked"),
        (LikeItself, "a_grid_for_another_shape_has_the_sizes_of_one_that_was_fitted"),
    ],
)
def test_a_grid_that_breaks_a_promise_fails(grid_class, promise):
    assert promise in failures(suite_of(grid_class))


# --- accumulators -----------------------------------------------------------------------------


class ForgetsMerge(SquaredNorms):
    def merge(self, other):
        pass


class Latest(SquaredNorms):
    """Knows the last rows alone."""

    def update(self, rows):
        if len(rows):
            self.sums = rows.float().square().sum(0)


class HalfSums(SquaredNorms):
    def __init__(self, inputs, device):
        super().__init__(inputs, device)
        self.sums = self.sums.half()


class Rescales(SquaredNorms):
    def update(self, rows):
        super().update(rows.mul_(1.0))
        rows.mul_(2.0)


class Mean(SquaredNorms):
    """Finite only once there are tokens."""

    tokens = 0

    def update(self, rows):
        super().update(rows)
        self.tokens += len(rows)

    def result(self):
        return self.sums / self.tokens


class OnceOnly(SquaredNorms):
    def result(self):
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        return sums


class ImpliesTwice(SquaredNorms):
    implies = {SquaredNorms: lambda norms: 2 * norms}


class NotWhite(SquaredNorms):
    @classmethod
    def isotropic(cls, result):
        return torch.zeros_like(result)


def suite_for(accumulator_class):
    class Suite(testing.AccumulatorContract):
        accumulator = accumulator_class

    return Suite


def test_an_honest_accumulator_passes():
    assert failures(suite_for(SquaredNorms)) == set()


@pytest.mark.parametrize(
    ("accumulator_class", "promise"),
    [
        (ForgetsMerge, "parts_merge_into_the_whole"),
        (ForgetsMerge, "nothing_merges_into_nothing_else"),
        (Latest, "the_order_of_the_tokens_does_not_matter"),
        (Mean, "no_tokens_add_nothing"),
        (HalfSums, "rows_of_half_precision_are_summed_in_float32"),
        (Rescales, "rows_are_not_changed"),
        (OnceOnly, "a_result_can_be_asked_for_twice_and_in_between"),
        (ImpliesTwice, "an_implied_statistic_is_the_one_its_own_accumulator_gives"),
        (NotWhite, "the_isotropic_statistic_is_that_of_an_identity_matrix"),
    ],
)
def test_an_accumulator_that_breaks_a_promise_fails(accumulator_class, promise):
    assert promise in failures(suite_for(accumulator_class))


def test_sums_in_inference_mode_are_part_of_the_contract():
    class InPlace(Accumulator):
        """Its sums are not writable outside of inference mode."""

        def __init__(self, inputs, device):
            super().__init__(inputs, device)
            self.sums = torch.zeros(inputs)

        def update(self, rows):
            self.sums += rows.float().square().sum(0)

        def merge(self, other):
            self.sums += other.sums

        def result(self):
            return self.sums

        @classmethod
        def isotropic(cls, result):
            return torch.ones_like(result)

    promise = "sums_taken_in_inference_mode_are_merged_and_read_outside"
    assert failures(suite_for(InPlace)) == {promise}


# --- backends ---------------------------------------------------------------------------------


class Honest(Pruner):
    name = "honest"
    summary = "prune by the norm of the inputs"
    needs = frozenset({SquaredNorms})

    def compress(self, state, statistics):
        score = state.weight.float().abs() * statistics[SquaredNorms].sqrt()
        pruned = lowest(score, self.options, state.pruned, per="row")
        return remove(state, pruned, off_grid=self.options.off_grid)


class ForgetsNotes(Honest):
    name = "forgets"

    def compress(self, state, statistics):
        return dataclasses.replace(super().compress(state, statistics), notes=())


class WritesInPlace(Honest):
    name = "writes"

    def compress(self, state, statistics):
        after = super().compress(state, statistics)
        state.weight.copy_(after.weight)
        return after


class ScalesStatistics(Honest):
    name = "scales"

    def compress(self, state, statistics):
        statistics[SquaredNorms].mul_(2.0)
        return super().compress(state, statistics)


class Unrepeatable(Honest):
    name = "unrepeatable"

    def compress(self, state, statistics):
        score = torch.rand(state.weight.shape)
        return remove(state, lowest(score, self.options, state.pruned, per="row"), off_grid=False)


class Lazy(Honest):
    name = "lazy"

    def compress(self, state, statistics):
        return dataclasses.replace(state, pruned=state.mask)


class Fragile(Honest):
    """Divides by the norm of the inputs, of which some are silent."""

    name = "fragile"

    def compress(self, state, statistics):
        weight = (state.weight.float() / statistics[SquaredNorms].sqrt()).to(state.weight.dtype)
        pruned = state.mask
        return dataclasses.replace(state, weight=weight.masked_fill(pruned, 0.0), pruned=pruned)


class Greedy(Honest):
    """Wants statistics that it does not declare."""

    name = "greedy"
    needs = frozenset()


class NewGrid(UniformQuantizer):
    name = "new_grid"
    summary = "round, and remove what becomes zero"

    def compress(self, state, statistics):
        grid = self.fit(state)
        weight = grid.nearest(state.weight)
        return dataclasses.replace(state, weight=weight, grid=grid, pruned=weight == 0)


class Unstable(Honest):
    """Its options do not survive being printed."""

    name = "unstable"

    @dataclasses.dataclass(frozen=True)
    class Options(PruningOptions):
        extra: float = option(0.0, "added at each reading")

    @classmethod
    def validate(cls, stage, options):
        return dataclasses.replace(super().validate(stage, options), extra=options.extra + 1)


def suite_with(backend_class, *texts):
    class Suite(testing.BackendContract):
        backend = backend_class
        stages = texts or (f"{backend_class.name}:0.5",)
        shape = (16, 32)

    return Suite


def test_an_honest_backend_passes():
    assert failures(suite_with(Honest, "honest:0.5", "honest(pattern=2:4, off_grid=true)")) == set()


@pytest.mark.parametrize(
    ("backend_class", "promise"),
    [
        (ForgetsNotes, "every_promise_of_a_layer_is_kept"),
        (WritesInPlace, "nothing_is_changed_in_place"),
        (ScalesStatistics, "nothing_is_changed_in_place"),
        (Unrepeatable, "the_same_layer_gives_the_same_result"),
        (Unrepeatable, "a_layer_that_no_token_reached_is_treated_by_a_rule_that_needs_none"),
        (Lazy, "a_pruner_removes_and_a_quantizer_rounds"),
        (Fragile, "every_promise_of_a_layer_is_kept"),
        (Fragile, "any_inputs_are_lived_with"),
        (Greedy, "a_layer_that_no_token_reached_is_treated_by_a_rule_that_needs_none"),
        (Unstable, "a_stage_has_one_canonical_text"),
    ],
)
def test_a_backend_that_breaks_a_promise_fails(backend_class, promise):
    assert promise in failures(suite_with(backend_class))


def test_a_quantizer_that_prunes_fails():
    suite = suite_with(NewGrid, "new_grid(bits=2, group_size=8)")
    assert "a_pruner_removes_and_a_quantizer_rounds" in failures(suite)


def test_a_shape_that_cannot_be_treated_is_named():
    assert "the_shape_can_be_treated" in failures(suite_with(Honest, "honest(pattern=5:7)"))


def test_statistics_are_those_that_the_backend_needs():
    statistics = suite_with(Honest)().statistics()
    assert isinstance(statistics, Statistics) and list(statistics.results) == [SquaredNorms]


# --- metrics ----------------------------------------------------------------------------------

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)


class Norm(Metric):
    """The mean square of the logits."""

    name = "norm"
    summary = "a metric for tests"
    higher_is_better = False

    def score(self, model, batch):
        return model(**batch).logits.float().square().mean((1, 2))


class Upside(Norm):
    higher_is_better = True


class Halfway(Norm):
    """Its value falls where its scores rise."""

    def value(self, mean):
        return 1 / mean


class Twoline(Norm):
    summary = "one line\nand another"


class Neighbors(Norm):
    """A score depends on the batch."""

    def score(self, model, batch):
        scores = super().score(model, batch)
        return scores + scores.mean()


class Once(Norm):
    """Skips the last batch where there are several."""

    def _scores(self, *arguments):
        scores = super()._scores(*arguments)
        return scores[:4]


class Twice(Norm):
    """Measures everything again, and the figure is of both."""

    def _scores(self, *arguments):
        first = super()._scores(*arguments)
        return torch.cat([first, super()._scores(*arguments)])


class Remembering(Norm):
    """The second figure is another."""

    runs = 0

    def measure(self, *arguments, **options):
        self.runs += 1
        return super().measure(*arguments, **options)

    def score(self, model, batch):
        return super().score(model, batch) * self.runs


class Random(Norm):
    def score(self, model, batch):
        return super().score(model, batch) * (1 + 1e-3 * torch.rand(()))


class Digestless(Norm):
    """Its digest is that of other samples."""

    def measure(self, model, samples, **options):
        result = super().measure(model, samples, **options)
        return dataclasses.replace(result, digest=samples.head(2).digest)


class Training(Norm):
    """Leaves the model in another mode."""

    def measure(self, model, samples, **options):
        result = super().measure(model, samples, **options)
        model.train()
        return result


class Changing(Norm):
    def score(self, model, batch):
        scores = super().score(model, batch)
        model.lm_head.weight.mul_(1.5)
        return scores


class Careless(Norm):
    """Turns NaN into a number."""

    def score(self, model, batch):
        return super().score(model, batch).nan_to_num()


class Details(Norm):
    """A figure that JSON cannot hold."""

    def details(self, mean, samples):
        return {"all": float("inf")}


def contract(metric_class):
    class Contract(testing.MetricContract):
        def metric(self):
            return metric_class()

        def model(self):
            torch.manual_seed(0)
            return LlamaForCausalLM(CONFIG)

        def samples(self):
            ids = torch.randint(0, 50, (5, 6), generator=torch.Generator().manual_seed(0))
            return Windows(ids, "made up")

    return Contract


def test_a_good_metric_passes():
    assert failures(contract(Norm)) == set()


def test_a_metric_that_breaks_a_promise_fails():
    for metric, test in [
        (Upside, "a_worse_model_has_a_lower_performance"),
        (Halfway, "a_worse_model_has_a_lower_performance"),
        (Twoline, "the_class_says_what_it_is"),
        (Neighbors, "a_score_does_not_depend_on_other_samples"),
        (Neighbors, "the_batch_size_does_not_matter"),
        (Once, "the_value_is_that_of_the_mean_score"),
        (Twice, "the_value_is_that_of_the_mean_score"),
        (Remembering, "a_measurement_is_deterministic"),
        (Random, "a_measurement_is_deterministic"),
        (Digestless, "a_measurement_says_what_was_measured_on_what"),
        (Details, "a_measurement_says_what_was_measured_on_what"),
        (Training, "the_model_is_left_unchanged"),
        (Changing, "the_model_is_left_unchanged"),
        (Careless, "a_model_that_computes_no_numbers_has_no_figure"),
    ]:
        assert test in failures(contract(metric)), metric.__name__


def test_a_hook_that_is_missing_is_an_error():
    class Incomplete(testing.MetricContract):
        def metric(self):
            return Perplexity()

    with pytest.raises(TypeError, match="model"):
        Incomplete()
