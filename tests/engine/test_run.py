import contextlib
import copy
import itertools

import pytest
import torch

from optimum_order.calibration.walk import walk
from optimum_order.engine import run as pipeline
from optimum_order.engine import snapshot
from optimum_order.engine.recipe import method
from optimum_order.engine.workdir import WorkDir
from optimum_order.errors import DataError, ModelError, OrderError
from optimum_order.layers.state import LayerState
from optimum_order.layers.error import relative_error
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics
from optimum_order.models.units import find_units
from optimum_order.order import Order, Stage


def run(model, order, batches=(), schedule="stage", **choice):
    units = find_units(model, **choice)
    order = pipeline.check(Order.of(order), units, schedule, calibrated=bool(batches))
    return pipeline.run(model, units, order, batches, schedule=schedule, progress=False)


def weights_of(model):
    return {target.name: target.read() for unit in find_units(model) for target in unit.targets}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestCheck:
    @pytest.fixture
    def units(self, make_model):
        return find_units(make_model("llama"))

    def test_gives_the_canonical_order(self, units):
        order = pipeline.check(
            Order.parse("wanda(sparsity=0.5) > gptq(bits=4)"), units, "stage", calibrated=True
        )
        assert str(order) == "wanda:0.5 > gptq:4"

    @pytest.mark.parametrize(
        ("order", "message"),
        [
            ("wandaa:0.5", "Unknown method 'wandaa'. Did you mean 'wanda'?"),
            (
                "rtn:4 > wanda:1",
                "'sparsity' (fraction of weights removed) must be a number in [0, 1), got 1.",
            ),
            (
                "gptq(bits=4, group_size=20)",
                "Stage 'gptq(bits=4, group_size=20)' cannot compress model.layers.0.self_attn.q_proj, "
                "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj and 9 more: group_size 20 does not "
                "divide its 32 inputs; 8, 16, 32 or -1 do.",
            ),
            (
                "rtn(bits=4, group_size=32)",
                "cannot compress model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj: group_size 32 does not "
                "divide its 48 inputs; 8, 12, 16, 24, 48 or -1 do.",
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
    def test_what_cannot_be_run_is_refused(self, units, order, message):
        with pytest.raises(OrderError) as caught:
            pipeline.check(Order.parse(order), units, "stage", calibrated=True)
        assert message in str(caught.value)

    def test_an_unknown_schedule_is_refused(self, units):
        with pytest.raises(
            OrderError,
            match=r"Unknown schedule 'blok'\. Did you mean 'block'\? Allowed: block, stage\.",
        ):
            pipeline.check(Order.parse("rtn:4"), units, "blok", calibrated=True)

    @pytest.mark.parametrize("stage", ["wanda:0.5", "sparsegpt:0.5", "gptq:4", "mixed_precision:4"])
    def test_a_stage_that_needs_calibration_is_named(self, units, stage):
        with pytest.raises(
            DataError, match=rf"Stage '{method(Stage.parse(stage)).stage}' needs calibration data"
        ):
            pipeline.check(
                Order.parse(f"magnitude:0.5 > {stage}"), units, "stage", calibrated=False
            )

    def test_others_need_none(self, units):
        pipeline.check(
            Order.parse("magnitude:0.5 > rtn:4 > bitsandbytes:int8"),
            units,
            "stage",
            calibrated=False,
        )


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss", "bert"])
def test_the_model_ends_with_the_weights_of_the_states(make_model, batches, architecture, schedule):
    model, before = make_model(architecture), make_model(architecture).state_dict()
    result = run(model, "wanda:0.5 > gptq:4", batches, schedule)
    weights = weights_of(model)
    assert set(result.states) == set(weights)
    for name, state in result.states.items():
        state.check(name)
        assert torch.equal(weights[name], state.weight)
        assert state.grid.bits == 4
        assert state.sparsity == pytest.approx(0.5)
        assert [record.stage for record in result.records[name]] == ["wanda:0.5", "gptq:4"]
    compressed = {id(target.parameter) for unit in find_units(model) for target in unit.targets}
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (id(parameter) in compressed), (
            name
        )  # biases, norms, embeddings and routers stay


def test_layers_that_were_left_out_stay(make_model, batches):
    model, before = make_model("llama"), weights_of(make_model("llama"))
    result = run(model, "gptq:4", batches, ignore=["*.down_proj", "model.layers.0.*"])
    assert set(result.states) == {
        name for name in before if "layers.1" in name and "down" not in name
    }
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name]) == (name not in result.states)


def test_the_order_matters_and_is_kept(make_model, batches):
    first, second = make_model("llama"), make_model("llama")
    pruned_first = run(first, "wanda:0.5 > gptq:3", batches)
    quantised_first = run(second, "gptq:3 > wanda:0.5", batches)
    assert not equal(weights_of(first), weights_of(second))
    for name in pruned_first.states:
        assert [record.stage for record in pruned_first.records[name]] == ["wanda:0.5", "gptq:3"]
        assert [record.stage for record in quantised_first.records[name]] == ["gptq:3", "wanda:0.5"]
    assert str(pruned_first.order) == "wanda:0.5 > gptq:3"


def test_the_same_run_gives_the_same_weights(make_model, batches):
    models = [make_model("mixtral") for _ in range(2)]
    for model in models:
        run(model, "sparsegpt:0.5 > gptq:4", batches)
    assert equal(*map(weights_of, models))


def test_schedule_stage_shows_a_stage_what_earlier_ones_made_of_the_whole_model(
    make_model, batches
):
    """So two stages in one run are two runs one after the other."""
    together, apart = make_model("llama"), make_model("llama")
    run(together, "gptq:4 > wanda(sparsity=0.5, off_grid=true)", batches, "stage")
    run(apart, "gptq:4", batches)
    run(apart, "wanda:0.5", batches)
    assert equal(weights_of(together), weights_of(apart))


def test_schedule_block_applies_all_stages_on_one_capture(make_model, batches):
    model, by_hand, staged = make_model("llama"), make_model("llama"), make_model("llama")
    order = Order.parse("gptq:4 > wanda(sparsity=0.5, off_grid=true)")
    run(model, order, batches, "block")

    def visit(at):
        for target in at.unit.targets:
            state = LayerState(target.read())
            for stage in order:
                state = method(stage).apply(state, at.statistics[target.name])
            target.write(state.weight)

    walk(by_hand, find_units(by_hand), batches, visit, gram=True)
    assert equal(weights_of(model), weights_of(by_hand))
    run(staged, order, batches, "stage")
    assert not equal(weights_of(model), weights_of(staged))


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
def test_stages_that_need_nothing_run_without_data(make_model, schedule):
    model = make_model("gpt2")
    before = weights_of(model)
    result = run(model, "magnitude:0.5 > rtn:4", (), schedule)
    for name, weight in before.items():
        state = method(Stage("rtn", 4)).apply(
            method(Stage("magnitude", 0.5)).apply(LayerState(weight))
        )
        assert torch.equal(result.states[name].weight, state.weight)


class TestRecords:
    def test_errors_are_measured_in_what_is_known(self, make_model, batches):
        model, before = make_model("llama"), weights_of(make_model("llama"))
        result = run(model, "rtn:3 > wanda:0.3 > gptq:2", batches)
        assert {tuple(r.measured_on for r in records) for records in result.records.values()} == {
            ("weights", "inputs", "outputs")
        }
        for name, (rounded, *_) in result.records.items():
            after = method(Stage("rtn", 3)).apply(LayerState(before[name])).weight
            expected = (after - before[name]).square().sum() / before[name].square().sum()
            assert rounded.relative_error == pytest.approx(expected.item(), rel=1e-4)
            assert all(0 < record.relative_error < 1 for record in result.records[name])

    def test_more_bits_leave_less_error(self, make_model, batches):
        def mean(order):
            records = run(make_model("llama"), order, batches).records.values()
            return sum(record.relative_error for (record,) in records) / len(records)

        assert mean("gptq:8") < mean("gptq:4") < mean("gptq:2")
        assert mean("gptq:3") < mean("wanda:0.9")

    def test_relative_error_is_that_of_the_outputs(self):
        generator = torch.Generator().manual_seed(0)
        X, before, after = (torch.randn(n, 8, generator=generator) for n in (30, 4, 4))
        outputs = ((X @ (after - before).T).square().sum() / (X @ before.T).square().sum()).item()
        known = Statistics(30, {Gram: X.T @ X})
        assert relative_error(before, after, known) == (
            pytest.approx(outputs, rel=1e-4),
            "outputs",
        )
        by_column = Statistics(30, {SquaredNorms: torch.ones(8)})
        weights = ((after - before).square().sum() / before.square().sum()).item()
        assert relative_error(before, after, by_column) == (
            pytest.approx(weights, rel=1e-4),
            "inputs",
        )
        for unknown in (None, Statistics(0, {Gram: torch.zeros(8, 8)})):
            assert relative_error(before, after, unknown) == (
                pytest.approx(weights, rel=1e-4),
                "weights",
            )

    def test_a_layer_of_zeros_has_no_error(self):
        assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2), None) == (
            0.0,
            "weights",
        )

    def test_idle_experts_are_noted(self, make_model):
        result = run(make_model("mixtral"), "gptq:4", [{"input_ids": torch.tensor([[5]])}])
        idle = [
            name
            for name, state in result.states.items()
            if state.notes and "no calibration token" in state.notes[0]
        ]
        assert len(idle) >= 4
        assert all(".experts." in name for name in idle)
        assert {result.records[name][0].measured_on for name in idle} == {"weights"}


class TestMixedPrecision:
    def bits(self, result):
        return {name: state.grid.bits for name, state in result.states.items()}

    @pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
    def test_meets_the_budget_with_one_width_for_layers_that_read_one_input(
        self, make_model, batches, quantizer
    ):
        order = f"mixed_precision(bits=3.6, quantizer={quantizer}, widths=[2,3,4,6])"
        result = run(make_model("llama"), order, batches)
        bits, sizes = (
            self.bits(result),
            {name: state.weight.numel() for name, state in result.states.items()},
        )
        average = sum(bits[name] * sizes[name] for name in bits) / sum(sizes.values())
        assert 3 < average <= 3.6
        assert len(set(bits.values())) > 1
        for i in range(2):
            for fused in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
                assert len({bits[f"model.layers.{i}.{name}_proj"] for name in fused}) == 1
        for name, records in result.records.items():
            assert [record.stage for record in records] == [f"{quantizer}:{bits[name]}"]

    def test_may_part_them_if_told_so(self, make_model, batches):
        result = run(
            make_model("llama"), "mixed_precision(bits=3, fuse=false, widths=[2,8])", batches
        )
        bits = self.bits(result)
        assert any(
            len({bits[f"model.layers.{i}.self_attn.{n}_proj"] for n in "qkv"}) > 1 for i in range(2)
        )

    def test_gives_few_bits_to_what_hardly_reaches_the_residual_stream(self, make_model, batches):
        """Attention's own relative errors are as large as ever: what counts is the block's output."""
        model = make_model("llama")
        for block in model.model.layers:
            block.self_attn.o_proj.weight.data *= 1e-3
        result = run(model, "mixed_precision(bits=4, quantizer=rtn, widths=[2,4,8])", batches)
        for name, bits in self.bits(result).items():
            assert bits == 2 if ".self_attn." in name else bits >= 4

    def test_of_one_width_is_that_quantiser(self, make_model, batches):
        """Measuring the candidates has left nothing behind in the model."""
        mixed, plain = make_model("llama"), make_model("llama")
        run(mixed, "mixed_precision(bits=4, widths=[4])", batches)
        run(plain, "gptq:4", batches)
        assert equal(weights_of(mixed), weights_of(plain))

    @pytest.mark.parametrize("first", ["weaker", "stronger"])
    def test_treats_every_layer_once_whichever_come_first(self, make_model, batches, first):
        result = run(
            make_model("llama"),
            f"mixed_precision(bits=3.6, widths=[2,3,4,6], first={first})",
            batches,
        )
        assert all(len(records) == 1 for records in result.records.values())
        assert len(set(self.bits(result).values())) > 1

    @pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
    @pytest.mark.parametrize(
        "order",
        ["sparsegpt:0.5 > mixed_precision:4", "mixed_precision:4 > wanda:0.5 > magnitude:0.6"],
    )
    def test_stands_anywhere_in_an_order(self, make_model, batches, order, schedule):
        result = run(make_model("qwen3_moe"), order, batches, schedule)
        for name, state in result.states.items():
            state.check(name)
            assert state.grid is not None
            assert state.sparsity >= 0.5
            assert len(result.records[name]) == len(Order.parse(order))


class Killed(BaseException):
    pass


CUT_OFF = [
    ("llama", "wanda:0.5 > gptq:4 > magnitude:0.6", "stage"),
    ("llama", "wanda:0.5 > gptq:4", "block"),
    (
        "llama",
        "magnitude:0.3 > mixed_precision(bits=3.6, widths=[2,3,4], first=weaker) > wanda:0.5",
        "stage",
    ),
    ("mixtral", "mixed_precision(bits=4, quantizer=rtn, widths=[3,4])", "block"),
    ("llama", "wanda:0.3 > magnitude:0.5 > wanda:0.6", "stage"),  # of which only masks are kept
    ("mixtral", "magnitude:0.3 > wanda:0.5", "block"),
    (
        "convnext",
        "sparsegpt:0.5 > rtn:4",
        "stage",
    ),  # its stages do more than hand on what blocks return
]


@pytest.mark.parametrize(("architecture", "order", "schedule"), CUT_OFF)
def test_a_run_that_is_cut_off_anywhere_ends_as_if_it_had_not_been(
    make_model,
    make_image_model,
    batches,
    image_batches,
    tmp_path,
    monkeypatch,
    architecture,
    order,
    schedule,
):
    """Killed after two files, then after one more, then three, in a run that each time goes on from there."""
    images = architecture == "convnext"
    model = (make_image_model if images else make_model)(architecture)
    original, inputs = copy.deepcopy(model.state_dict()), image_batches if images else batches
    expected = run(model, order, inputs, schedule)
    after = {name: value.clone() for name, value in model.state_dict().items()}

    save, kept, left = snapshot.save, [], 0

    def killed(value, file, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        kept.append(file.name)
        return save(value, file, **options)

    monkeypatch.setattr(snapshot, "save", killed)
    units, found = find_units(model), None
    order = pipeline.check(Order.parse(order), units, schedule, calibrated=True)
    for files in itertools.cycle((2, 1, 3)):
        left = files
        model.load_state_dict(original)
        with (
            contextlib.suppress(Killed),
            WorkDir(tmp_path / "work", {}, resume=bool(kept), patience=0) as work,
        ):
            found = pipeline.run(
                model, units, order, inputs, schedule=schedule, work=work, progress=False
            )
            break
    assert len(kept) > 1 and len(kept) == len(set(kept)), "nothing that was kept was done again"
    assert any("crossing" in name for name in kept) == (not images)
    assert found.records == expected.records and found.states.keys() == expected.states.keys()
    for name, state in found.states.items():
        state.check(name)
        assert torch.equal(state.weight, expected.states[name].weight)
        assert (
            torch.equal(state.mask, expected.states[name].mask)
            and state.notes == expected.states[name].notes
        )
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("again", [False, True])
def test_of_what_was_only_masked_no_weight_is_kept(make_model, batches, tmp_path, again):
    """Not on disk, where a run may also continue what others left, and be continued in its turn."""
    model = make_model("llama")
    units, order = find_units(model), Order.parse("wanda:0.3 > magnitude:0.5")
    start = run(make_model("llama"), "sparsegpt:0.2", batches) if again else None

    def once(resume):
        with WorkDir(tmp_path / "work", {}, resume=resume) as work:
            return pipeline.run(
                model, units, order, batches, start=start, work=work, progress=False
            )

    found = once(resume=False)
    files = sorted((tmp_path / "work").glob("*.state.safetensors"))
    kept = {name: state for file in files for name, state in snapshot.load(file)["states"].items()}
    assert kept.keys() == found.states.keys() and all(
        state.weight is None for state in kept.values()
    )
    assert {name: state.pruned.numel() for name, state in kept.items()} == {
        name: -(-state.weight.numel() // 8) for name, state in found.states.items()
    }
    model.load_state_dict(make_model("llama").state_dict())
    resumed, weights = once(resume=True), weights_of(model)
    for name, state in found.states.items():
        assert torch.equal(resumed.states[name].weight, state.weight)
        assert torch.equal(resumed.states[name].mask, state.mask)
        assert torch.equal(weights[name], state.weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused_before_anything_is_done(
    make_model, batches, value
):
    model = make_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    before = weights_of(model)
    with pytest.raises(
        ModelError,
        match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds a weight that is NaN or infinite",
    ):
        run(model, "wanda:0.5", batches)
    after = weights_of(model)
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(make_model, batches, dtype):
    result = run(make_model("llama").to(dtype), "sparsegpt:0.5 > gptq:4", batches)
    for state in result.states.values():
        assert state.weight.dtype == state.grid.dtype == dtype


def test_progress_is_shown_on_stderr_or_not_at_all(make_model, capsys):
    model = make_model("llama")
    units = find_units(model)
    order = pipeline.check(Order.parse("magnitude:0.5 > rtn:4"), units, "stage", calibrated=False)
    pipeline.run(model, units, order, (), progress=True)
    shown = capsys.readouterr()
    assert "rtn:4" in shown.err
    assert "4/4" in shown.err
    assert not shown.out
    pipeline.run(make_model("llama"), units, order, (), progress=False)
    assert not any(capsys.readouterr())


def test_there_is_one_copy_of_the_weights_unless_another_run_is_continued(make_model, batches):
    model = make_model("llama")
    units = find_units(model)
    order = pipeline.check(Order.parse("wanda:0.5 > gptq:4"), units, "stage", calibrated=True)
    result = pipeline.run(model, units, order, batches, progress=False)
    targets = {target.name: target for unit in units for target in unit.targets}
    assert all(
        result.states[name].weight.data_ptr() == target.view.data_ptr()
        for name, target in targets.items()
    )
    kept = {name: state.weight.clone() for name, state in result.states.items()}
    start = pipeline.Result(
        {n: LayerState(kept[n].clone()) for n in kept}, {name: [] for name in kept}
    )
    found = pipeline.run(model, units, order, batches, start=start, progress=False)
    assert not any(
        found.states[name].weight.data_ptr() == target.view.data_ptr()
        for name, target in targets.items()
    )
    assert all(torch.equal(start.states[name].weight, kept[name]) for name in kept)


@pytest.mark.parametrize(
    "order", ["sparsegpt:0.5 > gptq:4", "gptq:3 > wanda:0.5", "mixed_precision:4", "rtn:4"]
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("where", ["cpu:0", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_units_may_be_brought_to_another_device(make_model, batches, architecture, order, where):
    """To torch "cpu:0" is not "cpu", so that without a GPU all moving is done too, if only to where things are."""
    if where == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    here, there = make_model(architecture), make_model(architecture)
    expected = run(here, order, batches)
    units = find_units(there)
    checked = pipeline.check(Order.parse(order), units, "stage", calibrated=True)
    devices = set()
    forward = type(units[0].module).forward

    def watched(module, hidden, *args, **kwargs):
        devices.add((hidden.device.type, next(module.parameters()).device.type))
        return forward(module, hidden, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(units[0].module), "forward", watched)
        found = pipeline.run(
            there, units, checked, batches, device=torch.device(where), progress=False
        )
    kind = torch.device(where).type
    assert devices == (set() if order == "rtn:4" else {(kind, kind)})
    assert {parameter.device.type for parameter in there.parameters()} == {"cpu"}
    for name, state in expected.states.items():
        other = found.states[name]
        assert other.weight.device.type == "cpu"
        assert other.weight.data_ptr() not in {
            target.view.data_ptr() for unit in units for target in unit.targets
        }
        same = (other.weight == state.weight).float().mean()
        assert same == 1 if kind == "cpu" else same > 0.95
        assert not torch.is_inference(next(there.parameters()))
