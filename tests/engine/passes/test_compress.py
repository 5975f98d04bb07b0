"""Each verb of the engine is a loop over the blocks; its records say what was measured on what."""

from collections import defaultdict
from contextlib import closing

import pytest
import torch

from optimum_order.backends.base import Backend
from optimum_order.calibration.execution import PAUSES, Execution
from optimum_order.calibration.walk import walk
from optimum_order.engine.passes import compress
from optimum_order.engine.recipe import SCHEDULES, method
from optimum_order.errors import OrderError
from optimum_order.layers.inputs import InputGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Drift, Gram
from optimum_order.models.inputs import quantize_inputs
from optimum_order.models.units import find_units
from optimum_order.order import Order, Stage


class TestApply:
    def test_schedule_stage_is_one_walk_for_each_stage(
        self, make_model, batches, run, weights_of, equal
    ):
        """So two stages in one run are two runs one after the other."""
        for pause in PAUSES:
            together = make_model("llama")
            apart = make_model("llama")
            order = "gptq:4 > wanda(sparsity=0.5, off_grid=true)"
            run(together, order, batches, "stage", pause=pause)
            run(apart, "gptq:4", batches, pause=pause)
            run(apart, "wanda:0.5", batches, pause=pause)
            assert equal(weights_of(together), weights_of(apart))

    def test_schedule_block_applies_all_stages_on_one_capture(
        self, make_model, batches, run, weights_of, equal
    ):
        order = Order.parse("gptq:4 > wanda(sparsity=0.5, off_grid=true)")
        for pause in PAUSES:
            model = make_model("llama")
            run(model, order, batches, "block", pause=pause)
            by_hand = make_model("llama")
            execution = Execution(pause=pause)
            needs = {Gram, Drift}
            visits = walk(by_hand, find_units(by_hand), batches, needs=needs, execution=execution)
            with closing(visits):
                for visit in visits:
                    for target in visit.targets:
                        state = LayerState(target.read())
                        for stage in order:
                            state = method(stage).apply(state, visit.statistics[target.name])
                        target.write(state.weight)
            assert equal(weights_of(model), weights_of(by_hand))
            staged = make_model("llama")
            run(staged, order, batches, "stage", pause=pause)
            assert not equal(weights_of(model), weights_of(staged))

    def test_groups_of_layers_are_compressed_on_what_became_of_those_before(
        self, make_model, batches, run, weights_of
    ):
        """The first input of a model is the same in both modes, later ones are not."""
        ends = {}
        for pause in PAUSES:
            model = make_model("llama")
            run(model, "gptq:3", batches, pause=pause)
            ends[pause] = weights_of(model)
        same = {
            name: torch.equal(weight, ends["group"][name]) for name, weight in ends["block"].items()
        }
        first = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
        assert [name for name, equal in same.items() if equal] == first

    def test_later_blocks_read_what_earlier_ones_make_of_rounded_inputs(
        self, make_model, batches, run
    ):
        stage = "activations(bits=8, per=tensor)"
        scales = {}
        for pause in PAUSES:
            model = make_model("llama")
            states = run(model, stage, batches, pause=pause).states
            scales[pause] = {name: state.inputs.scale for name, state in states.items()}
        assert scales["block"] == scales["group"]
        name = "model.layers.1.self_attn.q_proj"
        largest = {}
        for rounds in (True, False):
            model = make_model("llama")
            for unit in find_units(model)[:1]:
                for target in unit.targets:
                    inputs = InputGrid("int8", scales["block"][target.name])
                    quantize_inputs(target.module, inputs if rounds else None)
            sizes = []
            model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, sizes=sizes: sizes.append(args[0].abs().max())
            )
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
            largest[rounds] = InputGrid.fit(max(sizes), "int8", model.dtype).scale
        assert torch.allclose(scales["block"][name], largest[True], rtol=1e-5)
        assert not torch.allclose(scales["block"][name], largest[False], rtol=1e-5)

    def test_a_forced_transform_gives_the_grids_of_inputs_up(self, make_model, batches, run):
        model = make_model("llama")
        result = run(model, "rtn:8 > activations:8 > rotate(force=true)", batches)
        assert all(state.inputs is None for state in result.states.values())
        assert not any(module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize(
        ("order", "expected"),
        [("gptq:4", True), ("wanda:0.5", False), ("sparsegpt:0.5", True), ("rtn:4", False)],
    )
    def test_memory_is_given_back_around_every_sweep_of_a_matrix(
        self, make_model, batches, run, monkeypatch, order, expected
    ):
        events = []
        monkeypatch.setattr(compress, "trim", lambda: events.append("trim"))
        apply = Backend.apply

        def noted(self, state, statistics=None, *, where="layer"):
            events.append(where)
            return apply(self, state, statistics, where=where)

        monkeypatch.setattr(Backend, "apply", noted)
        for pause in PAUSES:
            events.clear()
            run(make_model("llama"), order, batches, pause=pause)
            places = [place for place, event in enumerate(events) if event != "trim"]
            assert len(places) == 14
            if expected:
                for place in places:
                    assert events[place - 1] == events[place + 1] == "trim"
            else:
                assert "trim" not in events


class TestRecords:
    def test_errors_are_measured_on_what_is_there(self, make_model, batches, run, weights_of):
        before = weights_of(make_model("llama"))
        result = run(make_model("llama"), "rtn:3 > wanda:0.3 > gptq:2", batches)
        measured = {tuple(r.measured_on for r in records) for records in result.records.values()}
        assert measured == {("weights", "inputs", "outputs")}
        for name, (rounded, *_) in result.records.items():
            after = method(Stage("rtn", 3)).apply(LayerState(before[name])).weight
            expected = (after - before[name]).square().sum() / before[name].square().sum()
            assert rounded.relative_error == pytest.approx(expected.item(), rel=1e-4)
            assert all(0 < record.relative_error < 1 for record in result.records[name])

    def test_more_bits_leave_less_error(self, make_model, batches, run):
        def mean(order):
            records = run(make_model("llama"), order, batches).records.values()
            return sum(record.relative_error for (record,) in records) / len(records)

        assert mean("gptq:8") < mean("gptq:4") < mean("gptq:2")
        assert mean("gptq:3") < mean("wanda:0.9")

    def test_idle_experts_are_noted(self, make_model, run):
        for pause in PAUSES:
            token = [{"input_ids": torch.tensor([[5]])}]
            result = run(make_model("mixtral"), "gptq:4", token, pause=pause)
            idle = [
                name
                for name, state in result.states.items()
                if state.notes and "no calibration token" in state.notes[0]
            ]
            assert len(idle) >= 4
            assert all(".experts." in name for name in idle)
            assert {result.records[name][0].measured_on for name in idle} == {"weights"}


def bits_of(result):
    return {name: state.grid.bits for name, state in result.states.items()}


class TestMixedPrecision:
    @pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
    def test_meets_the_budget_with_one_width_for_layers_of_one_input(
        self, make_model, batches, run, quantizer
    ):
        order = f"mixed_precision(bits=3.6, quantizer={quantizer}, widths=[2,3,4,6])"
        for pause in PAUSES:
            result = run(make_model("llama"), order, batches, pause=pause)
            bits = bits_of(result)
            sizes = {name: state.weight.numel() for name, state in result.states.items()}
            average = sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values())
            assert 3 < average <= 3.6
            assert len(set(bits.values())) > 1
            groups = defaultdict(set)
            for name, width in bits.items():
                block, _, layer = name.rpartition(".")
                groups[
                    block, layer in ("gate_proj", "up_proj"), layer in ("o_proj", "down_proj")
                ].add(width)
            assert all(len(widths) == 1 for widths in groups.values())
            for name, records in result.records.items():
                assert [record.stage for record in records] == [f"{quantizer}:{bits[name]}"]

    def test_may_part_layers_of_one_input_if_told_so(self, make_model, batches, run):
        order = "mixed_precision(bits=3, fuse=false, widths=[2,8])"
        bits = bits_of(run(make_model("llama"), order, batches))
        assert any(
            len({bits[f"model.layers.{i}.self_attn.{part}_proj"] for part in "qkv"}) > 1
            for i in range(2)
        )

    def test_gives_few_bits_to_layers_that_hardly_reach_the_residual_stream(
        self, make_model, batches, run
    ):
        """The relative errors of attention are as large as ever: the block's output counts."""
        model = make_model("llama")
        for block in model.model.layers:
            block.self_attn.o_proj.weight.data *= 1e-3
        order = "mixed_precision(bits=4, quantizer=rtn, widths=[2,4,8])"
        for name, bits in bits_of(run(model, order, batches)).items():
            assert bits == 2 if ".self_attn." in name else bits >= 4

    @pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
    def test_gives_few_bits_to_a_block_that_the_loss_does_not_depend_on(
        self, make_model, batches, run, quantizer
    ):
        """The last block writes where no logit reads; the errors of its output are as large as ever."""
        widths = {}
        for error in ("block", "loss"):
            model = make_model("llama")
            half = len(model.model.norm.weight) // 2
            model.model.norm.weight.data[:half] = 0
            last = model.model.layers[1]
            for layer in (last.self_attn.o_proj, last.mlp.down_proj):
                layer.weight.data[half:] = 0
            order = f"mixed_precision(bits=4, quantizer={quantizer}, widths=[2,4,6], error={error})"
            widths[error] = bits_of(run(model, order, batches))
        inside = [name for name in widths["loss"] if name.startswith("model.layers.1.")]
        assert all(widths["loss"][name] == 2 for name in inside)
        assert any(widths["block"][name] > 2 for name in inside)
        assert all(width > 2 for name, width in widths["loss"].items() if name not in inside)

    def test_needs_gradients_by_the_outputs_of_each_layer(self, make_model, batches, run):
        model = make_model("qwen3_moe")
        with pytest.raises(OrderError, match="an expert layer that has none. Use error=block"):
            run(model, "mixed_precision(bits=4, error=loss)", batches)

    def test_of_one_width_is_that_quantizer(self, make_model, batches, run, weights_of, equal):
        """Measuring the candidates leaves nothing behind in the model."""
        for pause in PAUSES:
            mixed = make_model("llama")
            plain = make_model("llama")
            run(mixed, "mixed_precision(bits=4, widths=[4])", batches, pause=pause)
            run(plain, "gptq:4", batches, pause=pause)
            assert equal(weights_of(mixed), weights_of(plain))

    @pytest.mark.parametrize("first", ["weaker", "stronger"])
    def test_treats_every_layer_once_whichever_come_first(self, make_model, batches, run, first):
        order = f"mixed_precision(bits=3.6, widths=[2,3,4,6], first={first})"
        for pause in PAUSES:
            result = run(make_model("llama"), order, batches, pause=pause)
            assert all(len(records) == 1 for records in result.records.values())
            assert len(set(bits_of(result).values())) > 1

    def test_treats_its_targets_only(self, make_model, batches, run):
        order = "mixed_precision(bits=3, widths=[2,4], targets=*.mlp.*)"
        result = run(make_model("llama"), order, batches)
        for name, state in result.states.items():
            assert (state.grid is not None) == (".mlp." in name)
            assert len(result.records[name]) == (".mlp." in name)

    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize(
        "order",
        ["sparsegpt:0.5 > mixed_precision:4", "mixed_precision:4 > wanda:0.5 > magnitude:0.6"],
    )
    def test_stands_anywhere_in_an_order(self, make_model, batches, run, order, schedule):
        for pause in PAUSES:
            result = run(make_model("qwen3_moe"), order, batches, schedule, pause=pause)
            for name, state in result.states.items():
                state.check(name)
                assert state.grid is not None
                assert state.sparsity >= 0.5
                assert len(result.records[name]) == len(Order.parse(order))
