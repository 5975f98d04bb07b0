"""Contract suites: the promises of each kind of plug-in, as tests that its author subclasses.

    from optimum_order.testing import GridContract

    class TestPowersOfTwo(GridContract):
        def grids(self, weight):
            yield PowersOfTwo.fit(weight)

pytest collects the `test_*` methods of the subclass. A failure says on which case.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_order.backends.base import Backend
from optimum_order.data.samples import Samples
from optimum_order.errors import ArtifactError, InvariantError, ModelError
from optimum_order.evaluation.base import Measurement, Metric
from optimum_order.formats import Codec, outline
from optimum_order.layers.grids.base import ALL, Grid, Selection
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState, integers
from optimum_order.layers.statistics import Accumulator, Statistics
from optimum_order.layers.tree import map_tensors, tensors_in
from optimum_order.models.units import Target, find_targets
from optimum_order.order import Stage

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a weight may have."""


def gaussian(rows: int, inputs: int, seed: int = 0) -> Tensor:
    """Return standard normal numbers, (rows, inputs) float32.

    Args:
        rows: Number of rows.
        inputs: Number of columns.
        seed: Of the generator.
    """
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def same(first: Any, second: Any) -> bool:
    """Return whether two values are the same, bit for bit in every tensor.

    Args:
        first: Dataclasses, lists, dicts and tensors, nested.
        second: Likewise.
    """

    def outline(value: Any) -> Any:
        if isinstance(value, Tensor):
            return "tensor"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [field.name for field in dataclasses.fields(value) if field.repr]
            return type(value), {name: outline(getattr(value, name)) for name in fields}
        if isinstance(value, Mapping):
            return type(value), {key: outline(member) for key, member in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value), [outline(member) for member in value]
        return repr(value)

    return outline(first) == outline(second) and all(
        same_bits(one, other)
        for one, other in zip(tensors_in(first), tensors_in(second), strict=True)
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, so that -0.0 is not 0.0.

    Args:
        one: A tensor.
        other: Another.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (t.contiguous().flatten().view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


def _raises(
    error: type[Exception], function: Callable[..., object], *args: Any, **kwargs: Any
) -> bool:
    """Return whether a call raises this error."""
    try:
        function(*args, **kwargs)
    except error:
        return True
    return False


class GridContract(ABC):
    """The promises of a `Grid`.

    A subclass gives `grids`, and where scales are shared unlike in groups of inputs, `together`.
    """

    inputs: ClassVar[int] = 64
    """Columns of the weights that are rounded."""

    @abstractmethod
    def grids(self, weight: Tensor) -> Iterable[Grid]:
        """Yield grids fitted to a weight, one for each setting worth a test.

        Args:
            weight: (out, in), in each of `DTYPES`; some rows are zeros, some are large.
        """

    def together(self, grid: Grid) -> int:
        """Return how many neighboring columns must be taken together; 1 for any single column."""
        return grid.group_size if grid.group_size and grid.group_size > 0 else 1

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return a weight whose rows are unlike each other, (out, in)."""
        parts = [
            gaussian(6, self.inputs),
            gaussian(2, self.inputs, 1).abs(),
            gaussian(2, self.inputs, 2) + 3,
            gaussian(2, self.inputs, 3) * 1e-3,
            gaussian(2, self.inputs, 4).index_fill(1, torch.tensor([3]), 100.0),
            gaussian(2, self.inputs, 5) * (torch.arange(self.inputs) >= self.inputs // 2),
            torch.zeros(2, self.inputs),
            torch.full((2, self.inputs), 0.3),
        ]
        return torch.cat(parts).to(dtype)

    def cases(self) -> Iterator[tuple[Tensor, Grid, str]]:
        """Yield a weight, a grid fitted to it, and words for a message."""
        for dtype in DTYPES:
            weight = self.weight(dtype)
            for number, grid in enumerate(self.grids(weight)):
                yield weight, grid, f"{dtype}, grid {number} ({type(grid).__name__})"

    def column_selections(self, grid: Grid) -> list[Selection]:
        """Return selections of columns that `take` must accept."""
        step = self.together(grid)
        chunks = torch.arange(self.inputs).view(-1, step)
        order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0))
        some = chunks[order[: max(1, len(order) // 2)]].flatten()
        return [ALL, slice(0, step), some, chunks[order].flatten()]

    def row_selections(self, rows: int) -> list[Selection]:
        """Return selections of rows that `take` must accept."""
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
        return [ALL, slice(1, rows - 1), slice(0, 1), order[: rows // 2], order]

    def test_a_grid_is_a_frozen_dataclass_with_its_tensors_as_fields(self) -> None:
        """A grid can then be moved, written to a disk and compared."""
        for _, grid, case in self.cases():
            assert dataclasses.is_dataclass(grid), case
            assert type(grid).__dataclass_params__.frozen, case
            moved = map_tensors(lambda tensor: tensor.to("meta"), grid)
            assert all(tensor.is_meta for tensor in tensors_in(moved)), case
            assert tensors_in(grid), case

    def test_zero_is_on_the_grid(self) -> None:
        """Zero rounds to +0.0, unless `has_zero` is False, and no weight rounds to -0.0."""
        for weight, grid, case in self.cases():
            zeros = grid.nearest(torch.zeros_like(weight))
            if grid.has_zero:
                assert not integers(zeros).any(), f"{case}: 0.0 became another number or -0.0"
            values = grid.nearest(weight)
            assert not integers(values)[values == 0].any(), f"{case}: -0.0"

    def test_nearest_values_are_finite_and_on_the_grid(self) -> None:
        """Rounding twice is rounding once, in the dtype of the grid."""
        for weight, grid, case in self.cases():
            values = grid.nearest(weight)
            assert values.dtype == grid.dtype == weight.dtype, case
            assert values.shape == weight.shape, case
            assert torch.isfinite(values).all(), case
            assert torch.equal(grid.nearest(values), values), f"{case}: nearest is not idempotent"
            assert grid.holds(values), case

    def test_a_weight_off_the_grid_is_not_held(self) -> None:
        """`holds` sees a single weight that lies off the grid."""
        for weight, grid, case in self.cases():
            values = grid.nearest(weight)
            moved = torch.nonzero(values != weight)
            assert len(moved), f"{case}: give grids that round"
            row, column = moved[0].tolist()
            values[row, column] = weight[row, column]
            assert not grid.holds(values), case

    def test_codes_stand_for_values(self) -> None:
        """Codes are int16 in `bits` bits, and give the nearest values back."""
        for weight, grid, case in self.cases():
            codes = grid.quantize(weight)
            assert codes.dtype == torch.int16 and codes.shape == weight.shape, case
            assert int(codes.max()) - int(codes.min()) < 2**grid.bits, case
            values = grid.dequantize(codes)
            assert torch.equal(values, grid.nearest(weight)), case
            again = grid.dequantize(grid.quantize(values))
            assert torch.equal(integers(again), integers(values)), case

    def test_no_other_code_is_nearer(self) -> None:
        """No code is nearer to a weight than the code chosen for the weight."""
        for weight, grid, case in self.cases():
            codes = grid.quantize(weight)
            error = (grid.nearest(weight).double() - weight.double()).abs()
            rounding = 4 * torch.finfo(weight.dtype).eps * weight.double().abs()
            for code in range(int(codes.min()), int(codes.max()) + 1):
                values = grid.dequantize(torch.full_like(codes, code)).double()
                other = (values - weight.double()).abs()
                assert (error <= other + rounding).all(), f"{case}: code {code} is nearer"

    def test_columns_are_rounded_as_in_the_whole_weight(self) -> None:
        """Selected columns get the codes and values that they have in the whole."""
        order = torch.randperm(self.inputs, generator=torch.Generator().manual_seed(0))
        for weight, grid, case in self.cases():
            codes = grid.quantize(weight)
            for columns in (order, order[:5], slice(3, 11)):
                part = grid.quantize(weight[:, columns], columns)
                assert torch.equal(part, codes[:, columns]), case
                values = grid.dequantize(part, columns)
                assert torch.equal(values, grid.dequantize(codes)[:, columns]), case
                assert torch.equal(grid.nearest(weight[:, columns], columns), values), case

    def test_the_rounder_of_a_sweep_gives_the_nearest_values(self) -> None:
        """`rounder` is `nearest`, column by column."""
        columns = torch.randperm(self.inputs, generator=torch.Generator().manual_seed(0))[:64]
        for weight, grid, case in self.cases():
            between = weight.float() * 1.1
            values = grid.nearest(between).float()
            rounder = grid.rounder(columns)
            rounded = torch.empty(len(weight))
            for i, column in enumerate(columns.tolist()):
                rounder(i, between[:, column], rounded)
                assert torch.equal(rounded, values[:, column]), f"{case}: column {column}"

    def test_a_part_has_the_values_of_the_whole(self) -> None:
        """`take(r, c).dequantize(codes[r][:, c])` is `dequantize(codes)[r][:, c]`."""
        for weight, grid, case in self.cases():
            codes = grid.quantize(weight)
            values = grid.dequantize(codes)
            for rows, columns in itertools.product(
                self.row_selections(len(weight)), self.column_selections(grid)
            ):
                part = grid.take(rows, columns)
                assert type(part) is type(grid) and part.bits == grid.bits, case
                again = part.dequantize(codes[rows][:, columns])
                assert same(again, values[rows][:, columns]), f"{case}: take({rows}, {columns})"
                assert part.holds(again), case

    def test_codes_stay_where_scales_become_others(self) -> None:
        """`with_scales`, for a grid whose `scales` are free, stretches values and moves no code."""
        for weight, grid, case in self.cases():
            if grid.scales is None:
                continue
            codes = grid.quantize(weight)
            assert grid.with_scales(grid.scales.float()).holds(grid.dequantize(codes)), case
            generator = torch.Generator().manual_seed(0)
            factors = 0.8 + 0.45 * torch.rand(grid.scales.shape, generator=generator)
            other = grid.with_scales(grid.scales.float() * factors)
            assert type(other) is type(grid) and other.bits == grid.bits, case
            assert other.unit == grid.unit and other.dtype == grid.dtype, case
            assert torch.equal(other.quantize(other.dequantize(codes)), codes), case

    def test_a_part_that_separates_weights_of_one_scale_is_refused(self) -> None:
        """`take` raises ValueError for such columns, and for none."""
        for _, grid, case in self.cases():
            step = self.together(grid)
            selections: list[Selection] = [slice(0, 0)]
            if step > 1:
                selections += [slice(0, step - 1), slice(1, step + 1)]
                selections += [torch.arange(self.inputs).roll(1)]
            for columns in selections:
                refused = _raises(ValueError, grid.take, columns=columns)
                assert refused, f"{case}: take(columns={columns}) must raise ValueError"

    def test_parts_stack_to_the_whole(self) -> None:
        """`concat` of all rows, taken in parts, is the grid."""
        for weight, grid, case in self.cases():
            rows = len(weight)
            for ends in ([0, rows], [0, 1, rows], [0, rows // 3, rows // 2, rows]):
                parts = [grid.take(slice(*pair)) for pair in itertools.pairwise(ends)]
                assert same(type(grid).concat(parts), grid), f"{case}: rows {ends}"

    def test_grids_that_do_not_agree_are_not_stacked(self) -> None:
        """`concat` raises ValueError for other widths or dtypes, and for none."""
        for _, grid, case in self.cases():
            narrow = grid.take(columns=slice(0, self.together(grid)))
            other = map_tensors(
                lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, grid
            )
            stacks: list[list[Grid]] = [[]]
            if self.together(grid) < self.inputs:
                stacks += [[grid, narrow], [narrow, grid]]
            if other.dtype != grid.dtype:
                stacks += [[grid, other]]
            for stack in stacks:
                refused = _raises(ValueError, type(grid).concat, stack)
                assert refused, f"{case}: concat of unlike grids must raise ValueError"

    def test_a_grid_for_another_shape_has_the_sizes_of_one_that_was_fitted(self) -> None:
        """`like` gives the shapes and dtypes of a fit, and no values."""
        for dtype in DTYPES:
            weight = self.weight(dtype)
            larger = weight.repeat(2, 3)
            for grid, fitted in zip(self.grids(weight), self.grids(larger), strict=True):
                case = f"{dtype}, {type(grid).__name__}"
                grown = grid.like(*larger.shape)
                assert type(grown) is type(grid) and grown.dtype == grid.dtype, case
                sizes = [(part.shape, part.dtype) for part in tensors_in(grown)]
                assert sizes == [(part.shape, part.dtype) for part in tensors_in(fitted)], case
                for part in tensors_in(grown):
                    assert part.is_meta or not part.ndim, f"{case}: a scale holds values"
                assert (grown.bits, grown.unit) == (fitted.bits, fitted.unit), case


class AccumulatorContract:
    """The promises of an `Accumulator`.

    A subclass gives `accumulator`. Sums may differ by `tolerance`, relative to the largest entry
    of a result, since float32 addition depends on the order; a statistic without sums, such as a
    maximum, sets 0.
    """

    accumulator: ClassVar[type[Accumulator]]
    tolerance: ClassVar[float] = 1e-5
    inputs: ClassVar[int] = 24

    def gathered(self, *parts: Tensor) -> Accumulator:
        """Return an accumulator that has seen some rows, each part (tokens, in)."""
        accumulator = self.accumulator(self.inputs, torch.device("cpu"))
        for part in parts:
            accumulator.update(part)
        return accumulator

    def check_close(self, first: Any, second: Any) -> None:
        """Check that two results are equal within `tolerance`.

        Args:
            first: A result.
            second: A result of the same accumulator class.
        """
        pairs = list(zip(tensors_in(first), tensors_in(second), strict=True))
        assert pairs, "a result holds tensors"
        for one, other in pairs:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            error = (one.double() - other.double()).abs().max().item()
            assert error <= self.tolerance * other.double().abs().max().item(), error

    def test_parts_merge_into_the_whole(self) -> None:
        """Two accumulators that share the tokens merge into the result over all."""
        X = gaussian(300, self.inputs)
        whole = self.gathered(X).result()
        for size in (1, 100, 299):
            first = self.gathered(X[:size])
            first.merge(self.gathered(X[size:]))
            self.check_close(first.result(), whole)

    def test_nothing_merges_into_nothing_else(self) -> None:
        """An accumulator without tokens changes no other."""
        X = gaussian(30, self.inputs)
        whole = self.gathered(X).result()
        first = self.gathered()
        first.merge(self.gathered(X))
        self.check_close(first.result(), whole)
        second = self.gathered(X)
        second.merge(self.gathered())
        self.check_close(second.result(), whole)

    def test_the_order_of_the_tokens_does_not_matter(self) -> None:
        """Tokens may come in any order and in parts of any size."""
        X = gaussian(300, self.inputs)
        whole = self.gathered(X).result()
        self.check_close(self.gathered(X[200:], X[:200]).result(), whole)
        self.check_close(self.gathered(X.flip(0)).result(), whole)
        self.check_close(self.gathered(*torch.split(X, 7)).result(), whole)

    def test_no_tokens_add_nothing(self) -> None:
        """An update without rows changes no result, and no tokens give finite numbers."""
        X = gaussian(30, self.inputs)
        self.check_close(self.gathered(X[:0], X, X[:0]).result(), self.gathered(X).result())
        for part in tensors_in(self.gathered().result()):
            assert torch.isfinite(part).all()

    def test_rows_of_half_precision_are_summed_in_float32(self) -> None:
        """Sums of many rows neither overflow nor lose digits."""
        for dtype in DTYPES:
            X = (gaussian(1000, self.inputs).abs() + 50).to(dtype)
            self.check_close(self.gathered(X).result(), self.gathered(X.float()).result())
            for part in tensors_in(self.gathered(X).result()):
                assert torch.isfinite(part).all(), f"{dtype} overflows"

    def test_rows_are_not_changed(self) -> None:
        """An update leaves the rows as they are."""
        X = gaussian(30, self.inputs)
        before = X.clone()
        self.gathered(X).result()
        assert same(X, before)

    def test_a_result_can_be_asked_for_twice_and_in_between(self) -> None:
        """A result leaves the sums as they are."""
        X = gaussian(300, self.inputs)
        accumulator = self.gathered(X[:100])
        accumulator.result()
        accumulator.update(X[100:])
        self.check_close(accumulator.result(), self.gathered(X).result())
        self.check_close(accumulator.result(), self.gathered(X).result())

    def test_sums_taken_in_inference_mode_are_merged_and_read_outside(self) -> None:
        """Calibration runs in inference mode, and other code outside of it."""
        X = gaussian(30, self.inputs)
        with torch.inference_mode():
            accumulator = self.gathered(X[:10])
            other = self.gathered(X[10:])
        accumulator.merge(other)
        self.check_close(accumulator.result(), self.gathered(X).result())

    def test_an_implied_statistic_is_the_one_its_own_accumulator_gives(self) -> None:
        """Each function in `implies` gives the result of the other class."""
        X = gaussian(300, self.inputs)
        for implied, derive in self.accumulator.implies.items():
            own = implied(self.inputs, torch.device("cpu"))
            own.update(X)
            self.check_close(derive(self.gathered(X).result()), own.result())

    def test_the_isotropic_statistic_is_that_of_an_identity_matrix(self) -> None:
        """`isotropic` is the result over the rows of an identity matrix."""
        seen = self.gathered(gaussian(300, self.inputs)).result()
        white = self.accumulator.isotropic(seen)
        self.check_close(white, self.gathered(torch.eye(self.inputs)).result())


class BackendContract:
    """The promises of a `Backend`.

    A subclass gives `backend`, and in `stages` one text for each setting worth a test.
    """

    backend: ClassVar[type[Backend]]
    stages: ClassVar[Sequence[str]]
    shape: ClassVar[tuple[int, int]] = (64, 128)
    """Of the layers that are compressed, (out, in)."""

    def backends(self) -> list[Backend]:
        """Return the backend in every setting."""
        return [self.backend(Stage.parse(text)) for text in self.stages]

    def statistics(self) -> Statistics:
        """Return the statistics of correlated inputs, one of them silent, another loud."""
        inputs = self.shape[1]
        X = gaussian(2 * inputs, inputs // 4) @ gaussian(inputs // 4, inputs, 1)
        X += 0.3 * gaussian(2 * inputs, inputs, 2)
        X[:, 3] = 0.0
        X[:, 5] *= 100.0
        return Statistics.of(X, {need for backend in self.backends() for need in backend.needs})

    def states(self) -> Iterator[tuple[LayerState, str]]:
        """Yield layers as earlier stages may leave them, and words for a message.

        One row is zeros, another is wholly pruned, and so are groups of a third. A backend that
        reads the original weight is given one.
        """
        for state, case in self._states():
            yield self.with_original(state), case

    def with_original(self, state: LayerState) -> LayerState:
        """Return a layer with a weight near its own as the original, if the backend reads one."""
        if not self.backend.reads_original:
            return state
        near = state.weight + 0.1 * gaussian(*self.shape, 7).to(state.weight.dtype)
        return dataclasses.replace(state, original=near)

    def _states(self) -> Iterator[tuple[LayerState, str]]:
        for dtype in DTYPES:
            weight = gaussian(*self.shape).to(dtype)
            weight[1] = 0.0
            pruned = gaussian(*self.shape, 1) < -0.5
            pruned[2] = True
            pruned[3, : self.shape[1] // 2] = True
            masked = weight.masked_fill(pruned, 0.0)
            grid = UniformGrid.fit(weight, bits=4, group_size=self.shape[1] // 4)
            rounded = grid.nearest(weight)
            yield LayerState(weight), f"{dtype}"
            yield LayerState(masked, pruned), f"{dtype}, pruned"
            yield LayerState(rounded, grid=grid), f"{dtype}, quantized"
            both = LayerState(rounded.masked_fill(pruned, 0.0), pruned, grid, ("a note",))
            yield both, f"{dtype}, quantized and pruned"

    def results(self) -> Iterator[tuple[Backend, LayerState, LayerState, str]]:
        """Yield a backend, a layer before, the layer after, and words for a message."""
        for backend in self.backends():
            statistics = self.statistics()
            for before, case in self.states():
                after = backend.apply(before, statistics, where=case)
                yield backend, before, after, f"{backend.stage}, {case}"

    def test_the_class_describes_itself(self) -> None:
        """The name can be written in a stage; summary and options have words."""
        assert self.backend.summary and "\n" not in self.backend.summary
        for field in dataclasses.fields(self.backend.Options):
            assert field.metadata["help"], field.name
        assert self.backend.name == Stage(self.backend.name).method

    def test_a_stage_has_one_canonical_text(self) -> None:
        """The canonical stage reads back as the same options, and JSON holds these."""
        for backend in self.backends():
            again = self.backend(Stage.parse(str(backend.stage)))
            assert again.options == backend.options, str(backend.stage)
            assert again.stage == backend.stage
            json.dumps(backend.resolved)

    def test_the_shape_can_be_treated(self) -> None:
        """`check_shape` allows `shape`."""
        for backend in self.backends():
            assert backend.check_shape(self.shape) is None, f"{backend.stage}: set `shape`"

    def test_every_promise_of_a_layer_is_kept(self) -> None:
        """Mask, grid, shape, dtype and notes of earlier stages survive."""
        for backend, before, after, case in self.results():
            after.check(case)
            assert after.weight.shape == before.weight.shape, case
            assert after.weight.dtype == before.weight.dtype, case
            assert not (before.mask & ~after.mask).any(), f"{case}: a removed weight is back"
            assert after.notes[: len(before.notes)] == before.notes, f"{case}: a note is lost"
            off_grid = getattr(backend.options, "off_grid", False)
            if before.grid is not None and not off_grid:
                assert after.grid is not None, f"{case}: left the grid"

    def test_a_pruner_removes_and_a_quantizer_rounds(self) -> None:
        """A pruner has a mask; others leave it as it is, some of them the weight too."""
        sparser = 0
        for _, before, after, case in self.results():
            if self.backend.kind == "inputs":
                assert after.inputs is not None, case
                assert same(after, dataclasses.replace(before, inputs=after.inputs)), case
            elif self.backend.kind == "adapt":
                assert after.adapter is not None, case
                plain = dataclasses.replace(after, adapter=None, notes=before.notes)
                assert same(plain, dataclasses.replace(before, original=None)), case
            elif self.backend.kind == "quantize":
                assert after.grid is not None, case
                assert torch.equal(after.mask, before.mask), f"{case}: the mask has changed"
            else:
                assert after.pruned is not None, case
                sparser += after.sparsity > before.sparsity
        assert sparser or self.backend.kind != "prune", "nothing was pruned"

    def test_nothing_is_changed_in_place(self) -> None:
        """The layer before and its statistics have the bits that they had."""
        for backend in self.backends():
            statistics = self.statistics()
            gathered = map_tensors(torch.clone, dict(statistics.results))
            for before, case in self.states():
                copy = map_tensors(torch.clone, before)
                backend.apply(before, statistics)
                assert same(before, copy), f"{backend.stage}, {case}: the layer was changed"
                assert same(dict(statistics.results), gathered), f"{backend.stage}, {case}"

    def test_the_same_layer_gives_the_same_result(self) -> None:
        """A second run gives the same bits."""
        states = list(itertools.islice(self.states(), 4))
        for backend in self.backends():
            for state, case in states:
                first = backend.apply(state, self.statistics())
                second = backend.apply(state, self.statistics())
                assert same(first, second), f"{backend.stage}, {case}"

    def test_a_layer_of_zeros_stays_zeros(self) -> None:
        """A layer without weights, pruned or not, is treated like any other."""
        zeros = torch.zeros(self.shape)
        for backend in self.backends():
            for state in (LayerState(zeros), LayerState(zeros, torch.ones_like(zeros).bool())):
                after = backend.apply(self.with_original(state), self.statistics())
                assert not integers(after.weight).any(), f"{backend.stage}"
                assert state.pruned is None or after.mask.all()

    def test_any_inputs_are_lived_with(self) -> None:
        """Of one token, of silence, and so loud that products nearly overflow."""
        weight = gaussian(*self.shape)
        inputs = self.shape[1]
        for X in (gaussian(1, inputs), torch.zeros(9, inputs), gaussian(9, inputs) * 1e10):
            for backend in self.backends():
                state = self.with_original(LayerState(weight))
                backend.apply(state, Statistics.of(X, backend.needs))

    def test_a_layer_that_no_token_reached_is_treated_by_a_rule_that_needs_none(self) -> None:
        """Statistics of no tokens are taken as white noise, and a note says so."""
        state = self.with_original(LayerState(gaussian(*self.shape)))
        for backend in self.backends():
            idle = Statistics.of(torch.zeros(0, self.shape[1]), backend.needs)
            after = backend.apply(state, idle)
            if not backend.needs:
                assert same(after, backend.apply(state)), f"{backend.stage}"
                continue
            white = Statistics.of(torch.eye(self.shape[1]), backend.needs)
            expected = backend.apply(state, white)
            assert same(after.weight, expected.weight), f"{backend.stage}"
            note = (
                f"{backend.stage}: no calibration token reached this layer; "
                "its inputs were taken as white noise"
            )
            assert after.notes == (note, *expected.notes)

    def test_a_backend_is_not_run_without_its_statistics(self) -> None:
        """A missing statistic raises InvariantError, and no other backend asks."""
        state = self.with_original(LayerState(gaussian(*self.shape)))
        for backend in self.backends():
            for statistics in (None, Statistics(5, {})):
                refusal = None
                try:
                    backend.apply(state, statistics, where="layer 7")
                except InvariantError as error:
                    refusal = str(error)
                if backend.needs:
                    assert refusal, f"{backend.stage} ran without what it needs"
                    assert "layer 7, stage" in refusal, refusal
                else:
                    assert refusal is None, refusal

    def test_layers_are_chosen_by_name(self) -> None:
        """The option `targets` takes a pattern or a list, and reads back."""
        for text in self.stages:
            stage = Stage.parse(text)
            named = dict(stage.options)
            if stage.value is not None:
                named[dataclasses.fields(self.backend.Options)[0].name] = stage.value
            for targets in ("a.b", ("a.b", "re:c.+")):
                backend = self.backend(Stage(stage.method, **named, targets=targets))
                assert backend.covers("a.b") and not backend.covers("d")
                assert backend.covers("cc") is isinstance(targets, tuple)
                again = self.backend(Stage.parse(str(backend.stage)))
                assert again.targets == backend.targets and again.stage == backend.stage


class CodecContract(ABC):
    """The promises of a `Codec`."""

    @abstractmethod
    def codec(self) -> Codec:
        """Return the codec."""

    @abstractmethod
    def states(self) -> Iterator[LayerState]:
        """Yield layers that the codec encodes: every kind of grid, width, dtype and mask."""

    def refused(self) -> Iterator[LayerState]:
        """Yield layers that the codec cannot hold, whatever their values are."""
        yield from ()

    def target(self) -> Target:
        """Return where the layers are in a model; by default an `nn.Linear`."""
        return find_targets(nn.ModuleList([nn.Linear(1, 1)]))[0]

    def test_decode_returns_what_was_encoded(self) -> None:
        """Weight and grid come back bit for bit, and the mask if there is one."""
        codec = self.codec()
        count = 0
        for state in self.states():
            state.check("yielded by states()")
            assert codec.encodes(state)
            scheme = json.loads(json.dumps(codec.scheme(state)))
            decoded = codec.decode(codec.encode(state), scheme)
            assert same_bits(decoded.weight, state.weight)
            assert type(decoded.grid) is type(state.grid)
            for one, other in zip(tensors_in(decoded.grid), tensors_in(state.grid), strict=True):
                assert same_bits(one, other)
            assert same(decoded.inputs, state.inputs)
            if decoded.pruned is not None:
                assert torch.equal(decoded.pruned, state.mask)
            decoded.check("decoded")
            count += 1
        assert count, "states() yields no layer"

    def test_tensors_have_declared_names(self) -> None:
        """A loader finds the tensors of a layer by the names in `tensors`."""
        codec = self.codec()
        for state in self.states():
            assert set(codec.encode(state)) <= set(codec.tensors)

    def test_size_is_known_from_shapes(self) -> None:
        """`size` of an outline is the size of the tensors, or no less where it is not exact."""
        codec = self.codec()
        for state in self.states():
            size = sum(tensor.nbytes for tensor in codec.encode(state).values())
            for bound in (codec.size(state), codec.size(outline(state))):
                assert bound.bytes == size if bound.exact else bound.bytes >= size

    def test_refusals_need_no_values(self) -> None:
        """`why_not` says of an outline what it says of the layer."""
        codec = self.codec()
        target = self.target()
        for state in self.states():
            assert codec.why_not(target, state) is None
            assert codec.why_not(target, outline(state)) is None
            assert codec.why_not_values(state) is None
        for state in self.refused():
            reason = codec.why_not(target, outline(state))
            assert reason and reason == codec.why_not(target, state)

    def test_damaged_tensors_are_refused_or_another_layer(self) -> None:
        """No tensors at all are an ArtifactError; damaged ones may also be a layer that is sound.

        Nothing else may be raised: tensors come from files that nobody has checked.
        """
        codec = self.codec()
        for state in self.states():
            scheme = codec.scheme(state)
            for damaged in _damaged(codec.encode(state)):
                try:
                    decoded = codec.decode(damaged, scheme)
                except ArtifactError:
                    continue
                assert damaged, "decoded without any tensor"
                decoded.check("decoded from damaged tensors")


def _damaged(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a layer with all or one missing, one cut, longer or of another kind."""
    yield {}
    for name, tensor in tensors.items():
        yield {key: value for key, value in tensors.items() if key != name}
        if tensor.ndim:
            yield tensors | {name: tensor[:-1]}
            yield tensors | {name: torch.cat([tensor, tensor[:1]])}
        yield tensors | {name: tensor.to(torch.float64)}
        yield tensors | {name: tensor[None]}


class MetricContract(ABC):
    """The promises of every metric.

    A hook returns the same thing, made anew, at every call.
    """

    tolerance: float = 1e-4
    """Relative difference of scores that rounding in other batches may cause."""

    @abstractmethod
    def metric(self) -> Metric:
        """Return the metric."""

    @abstractmethod
    def model(self) -> PreTrainedModel:
        """Return a model that is good on the samples, so that noise in its weights is a loss."""

    @abstractmethod
    def samples(self) -> Samples:
        """Return four or more samples that differ."""

    def worse_model(self) -> PreTrainedModel:
        """Return a model that the metric must find worse than `model()`: by default, with noise."""
        model = self.model()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise * parameter.std(correction=0))
        return model

    def measure(self, model: PreTrainedModel, samples: Samples, batch_size: int = 2) -> Measurement:
        """Return the measurement of a fresh metric.

        Args:
            model: The model to measure.
            samples: The samples to measure on.
            batch_size: Samples at a time.
        """
        return self.metric().measure(model, samples, batch_size=batch_size, progress=False)

    def test_the_class_says_what_it_is(self) -> None:
        """Name and summary are one line."""
        cls = type(self.metric())
        assert cls.name and cls.name == cls.name.strip(), "'name' is the word a user types"
        assert cls.summary and "\n" not in cls.summary, "'summary' is one line"
        assert isinstance(cls.higher_is_better, bool), "'higher_is_better' is True or False"

    def test_a_worse_model_has_a_lower_performance(self) -> None:
        """Performance falls where the model is noise."""
        good = self.measure(self.model(), self.samples())
        worse = self.measure(self.worse_model(), self.samples())
        assert worse.performance < good.performance, (
            f"M must be higher for the better model: got {good.performance} for it and "
            f"{worse.performance} for the worse one; see 'higher_is_better'"
        )
        lower = worse.value < good.value if good.higher_is_better else worse.value > good.value
        assert lower, "'higher_is_better' must be true of the value as of the scores"

    def test_the_value_is_that_of_the_mean_score(self) -> None:
        """`value` of the mean score is the figure."""
        samples = self.samples()
        result = self.measure(self.model(), samples)
        count = len(samples)
        assert len(result.scores) == count, "every sample has one score"
        mean = math.fsum(result.scores) / count
        assert math.isclose(result.value, self.metric().value(mean), rel_tol=1e-9, abs_tol=1e-12)
        variance = math.fsum((score - mean) ** 2 for score in result.scores) / (count - 1)
        assert result.standard_error is not None
        assert math.isclose(
            result.standard_error, math.sqrt(variance / count), rel_tol=1e-6, abs_tol=1e-12
        )

    def test_a_score_does_not_depend_on_other_samples(self) -> None:
        """A batch of one gives the score that a larger batch gives."""
        samples = self.samples()
        whole = self.measure(self.model(), samples).scores
        part = self.measure(self.model(), samples.take(torch.tensor([2, 0])), 1).scores
        self._check_equal(part, (whole[2], whole[0]), "of a sample that is measured alone")

    def test_the_batch_size_does_not_matter(self) -> None:
        """Any batch size gives the same figure."""
        samples = self.samples()
        expected = self.measure(self.model(), samples, 1).scores
        for batch_size in (3, len(samples), 2 * len(samples)):
            scores = self.measure(self.model(), samples, batch_size).scores
            self._check_equal(scores, expected, f"in batches of {batch_size}")

    def test_a_measurement_is_deterministic(self) -> None:
        """A second measurement gives the same figure."""
        models = [self.model() for _ in range(3)]  # first of all: a hook may set torch's seed
        samples = self.samples()
        metric = self.metric()
        first, second = (
            metric.measure(model, samples, batch_size=2, progress=False) for model in models[:2]
        )
        assert first == second, "a metric must not depend on what it measured before"
        assert first == self.measure(models[2], samples), "a metric must not draw at random"

    def test_a_measurement_says_what_was_measured_on_what(self) -> None:
        """The record names metric, samples and digest, and JSON holds it."""
        samples = self.samples()
        result = self.measure(self.model(), samples)
        assert (result.name, result.source) == (self.metric().name, samples.source)
        assert result.digest == samples.digest, "the digest is that of all samples"
        assert result.tokens == samples.tokens
        facts = result.as_dict()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts, "a manifest holds it"
        assert facts["samples"] == len(samples)

    def test_the_model_is_left_unchanged(self) -> None:
        """Weights and mode of the model are what they were."""
        for training in (True, False):
            model = self.model().train(training)
            before = copy.deepcopy(model.state_dict())
            self.measure(model, self.samples())
            assert model.training is training, "the mode is restored"
            after = model.state_dict()
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_a_model_that_computes_no_numbers_has_no_figure(self) -> None:
        """NaN raises ModelError."""
        model = self.model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        refused = _raises(ModelError, self.measure, model, self.samples())
        assert refused, "NaN must be refused with a ModelError"

    def _check_equal(
        self, scores: tuple[float, ...], expected: tuple[float, ...], when: str
    ) -> None:
        assert len(scores) == len(expected)
        for score, wanted in zip(scores, expected, strict=True):
            close = math.isclose(score, wanted, rel_tol=self.tolerance, abs_tol=1e-9)
            assert close, f"the score {when} is {score}, not {wanted}"
