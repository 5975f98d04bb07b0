"""One run: the model ends with the states' weights, in both modes, however often it is cut off."""

import contextlib
import copy
import itertools
import os
from collections import Counter
from typing import ClassVar

import pytest
import torch

from optimum_order.backends.base import Backend
from optimum_order.calibration.execution import PAUSES, Execution
from optimum_order.calibration.ranks import Ranks
from optimum_order.engine import snapshot
from optimum_order.engine.passes import rewrite
from optimum_order.engine.recipe import SCHEDULES, Recipe, method
from optimum_order.engine.run import Result, Subject, refuse
from optimum_order.engine.run import run as run_recipe
from optimum_order.engine.workdir import FollowedWorkDir, WorkDir
from optimum_order.errors import ModelError, OrderError, OutputError, RankError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import SquaredNorms
from optimum_order.models.units import find_units
from optimum_order.order import Order, Stage
from optimum_order.testing import same


class TestResult:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss", "bert"])
    def test_the_model_ends_with_the_weights_of_the_states(
        self, make_model, batches, run, weights_of, architecture, schedule
    ):
        for pause in PAUSES:
            model = make_model(architecture)
            before = make_model(architecture).state_dict()
            result = run(model, "wanda:0.5 > gptq:4", batches, schedule, pause=pause)
            weights = weights_of(model)
            assert set(result.states) == set(weights)
            for name, state in result.states.items():
                state.check(name)
                assert torch.equal(weights[name], state.weight)
                assert state.grid.bits == 4
                assert state.sparsity == pytest.approx(0.5)
                stages = [record.stage for record in result.records[name]]
                assert stages == ["wanda:0.5", "gptq:4"]
            compressed = {id(t.parameter) for unit in find_units(model) for t in unit.targets}
            for name, parameter in model.named_parameters():
                changed = not torch.equal(parameter, before[name])
                # Biases, norms, embeddings and routers stay.
                assert changed == (id(parameter) in compressed), name

    @pytest.mark.parametrize("architecture", ["vit", "resnet", "regnet"])
    def test_of_images_is_no_other(
        self, make_image_model, image_batches, run, weights_of, equal, architecture
    ):
        ends = {}
        for pause in PAUSES:
            model = make_image_model(architecture)
            result = run(model, "wanda:0.5 > rtn:4", image_batches, pause=pause)
            ends[pause] = weights_of(model)
            assert equal(ends[pause], {name: s.weight for name, s in result.states.items()})
            for name, state in result.states.items():
                state.check(name)
                assert state.sparsity == pytest.approx(0.5, abs=0.01)
        assert not equal(*ends.values()), "later layers see what became of earlier ones"

    def test_layers_that_are_left_out_stay(self, make_model, batches, run, weights_of):
        before = weights_of(make_model("llama"))
        for pause in PAUSES:
            model = make_model("llama")
            ignore = ["*.down_proj", "model.layers.0.*"]
            result = run(model, "gptq:4", batches, ignore=ignore, pause=pause)
            expected = {name for name in before if "layers.1" in name and "down" not in name}
            assert set(result.states) == expected
            for name, weight in weights_of(model).items():
                assert torch.equal(weight, before[name]) == (name not in expected)

    def test_a_stage_treats_its_targets_only(self, make_model, batches, run, weights_of):
        before = weights_of(make_model("llama"))
        order = "gptq(bits=3, targets=*.q_proj) > wanda(sparsity=0.5, targets=*.1.mlp.*)"
        for pause, schedule in itertools.product(PAUSES, SCHEDULES):
            model = make_model("llama")
            result = run(model, order, batches, schedule, pause=pause)
            for name, weight in weights_of(model).items():
                stages = [record.stage for record in result.records[name]]
                state = result.states[name]
                if name.endswith("q_proj"):
                    assert stages == ["gptq(bits=3, targets=*.q_proj)"]
                    assert state.grid.bits == 3
                elif ".1.mlp." in name:
                    assert stages == ["wanda(sparsity=0.5, targets=*.1.mlp.*)"]
                    assert state.sparsity == 0.5
                else:
                    assert stages == []
                    assert torch.equal(weight, before[name])

    def test_the_order_matters_and_is_kept(self, make_model, batches, run, weights_of, equal):
        first = make_model("llama")
        second = make_model("llama")
        pruned_first = run(first, "wanda:0.5 > gptq:3", batches)
        quantized_first = run(second, "gptq:3 > wanda:0.5", batches)
        assert not equal(weights_of(first), weights_of(second))
        for name in pruned_first.states:
            stages = [record.stage for record in pruned_first.records[name]]
            assert stages == ["wanda:0.5", "gptq:3"]
            stages = [record.stage for record in quantized_first.records[name]]
            assert stages == ["gptq:3", "wanda:0.5"]
        assert str(pruned_first.order) == "wanda:0.5 > gptq:3"

    def test_the_same_run_gives_the_same_weights(self, make_model, batches, run, weights_of, equal):
        for pause in PAUSES:
            models = [make_model("mixtral") for _ in range(2)]
            for model in models:
                run(model, "sparsegpt:0.5 > gptq:4", batches, pause=pause)
            assert equal(*map(weights_of, models))

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_stages_that_need_nothing_run_without_data(self, make_model, run, weights_of, schedule):
        model = make_model("gpt2")
        before = weights_of(model)
        result = run(model, "magnitude:0.5 > rtn:4", (), schedule)
        pruner = method(Stage("magnitude", 0.5))
        quantizer = method(Stage("rtn", 4))
        for name, weight in before.items():
            state = quantizer.apply(pruner.apply(LayerState(weight)))
            assert torch.equal(result.states[name].weight, state.weight)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_stays(self, make_model, batches, run, dtype):
        for pause in PAUSES:
            model = make_model("llama").to(dtype)
            result = run(model, "sparsegpt:0.5 > gptq:4", batches, pause=pause)
            for state in result.states.values():
                assert state.weight.dtype == state.grid.dtype == dtype

    def test_weights_that_are_not_finite_are_refused_before_anything_is_done(
        self, make_model, batches, run, weights_of
    ):
        for value in (torch.nan, torch.inf):
            model = make_model("llama")
            model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
            before = weights_of(model)
            message = r"'model\.layers\.1\.mlp\.up_proj\.weight' holds a weight that is NaN or inf"
            with pytest.raises(ModelError, match=message):
                run(model, "wanda:0.5", batches)
            after = weights_of(model)
            for name in before:
                assert torch.equal(before[name].nan_to_num(), after[name].nan_to_num())

    def test_progress_is_shown_on_stderr_or_not_at_all(self, make_model, run, capsys):
        run(make_model("llama"), "magnitude:0.5 > rtn:4", progress=True)
        shown = capsys.readouterr()
        assert "rtn:4" in shown.err
        assert "4 of 4" in shown.err
        assert not shown.out
        run(make_model("llama"), "magnitude:0.5 > rtn:4", progress=False)
        assert not any(capsys.readouterr())


class TestStart:
    def test_a_run_goes_on_from_the_states_of_another(
        self, make_model, batches, run, weights_of, equal
    ):
        together = make_model("llama")
        whole = run(together, "sparsegpt:0.5 > gptq:4", batches)
        first = run(make_model("llama"), "sparsegpt:0.5", batches)
        model = make_model("llama")
        second = run(model, "gptq:4", batches, start=first)
        assert equal(weights_of(model), weights_of(together))
        assert second.records == whole.records
        assert str(second.order) == "sparsegpt:0.5 > gptq:4"
        assert [len(records) for records in first.records.values()] == [1] * len(first.records)

    def test_the_weights_are_in_memory_once_unless_another_run_is_continued(
        self, make_model, batches, run
    ):
        model = make_model("llama")
        targets = {t.name: t for unit in find_units(model) for t in unit.targets}
        result = run(model, "wanda:0.5 > gptq:4", batches)
        for name, target in targets.items():
            assert result.states[name].weight.data_ptr() == target.view.data_ptr()
        weights = {name: state.weight.clone() for name, state in result.states.items()}
        states = {name: LayerState(weight.clone()) for name, weight in weights.items()}
        start = Result(states, {name: [] for name in states})
        again = run(model, "wanda:0.5 > gptq:4", batches, start=start)
        for name, target in targets.items():
            assert again.states[name].weight.data_ptr() != target.view.data_ptr()
            assert torch.equal(start.states[name].weight, weights[name])


@pytest.fixture
def applied(monkeypatch):
    """How often each stage was applied to each layer."""
    counts = Counter()
    apply = Backend.apply

    def counting(self, state, statistics=None, *, where="layer"):
        counts[where, str(self.stage)] += 1
        return apply(self, state, statistics, where=where)

    monkeypatch.setattr(Backend, "apply", counting)
    return counts


CUT_OFF = [
    ("llama", "wanda:0.5 > gptq:4 > magnitude:0.6", "stage"),
    ("llama", "wanda:0.5 > gptq:4", "block"),
    ("llama", "gptq:3 > sparsegpt:0.5 > gptq:4", "stage"),  # each stage compares with the last
    (
        "llama",
        "magnitude:0.3 > mixed_precision(bits=3.6, widths=[2,3,4], first=weaker) > wanda:0.5",
        "stage",
    ),
    ("mixtral", "mixed_precision(bits=4, quantizer=rtn, widths=[3,4])", "block"),
    ("llama", "wanda:0.3 > magnitude:0.5 > wanda:0.6", "stage"),  # only masks are on the disk
    ("mixtral", "magnitude:0.3 > wanda:0.5", "block"),
    ("llama", "gptq(bits=3, targets=*.1.mlp.*) > wanda(sparsity=0.5, targets=*.q_proj)", "stage"),
    ("llama", "activations(bits=8, per=tensor) > gptq:4 > activations:fp8", "stage"),
    ("llama", "gptq:8 > activations(bits=fp8, per=tensor)", "block"),
    ("convnext", "sparsegpt:0.5 > rtn:4", "stage"),  # its stages do more than run blocks
]


class TestResume:
    @pytest.mark.parametrize("pause", PAUSES)
    @pytest.mark.parametrize(("architecture", "order", "schedule"), CUT_OFF)
    def test_a_run_that_is_cut_off_anywhere_ends_as_if_it_had_not_been(
        self,
        make_model,
        make_image_model,
        batches,
        image_batches,
        tmp_path,
        run,
        killed_after,
        architecture,
        order,
        schedule,
        pause,
    ):
        """Killed after two files, then after one more, then three, and each time resumed."""
        images = architecture == "convnext"
        model = (make_image_model if images else make_model)(architecture)
        inputs = image_batches if images else batches
        original = copy.deepcopy(model.state_dict())
        expected = run(model, order, inputs, schedule, pause=pause)
        after = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            outputs = model(**inputs[0]).to_tuple()[0]
        saved = []
        result = None
        for files in itertools.cycle((2, 1, 3)):
            saved = killed_after(files)
            model.load_state_dict(original)
            with (
                contextlib.suppress(killed_after.Killed),
                WorkDir(tmp_path / "work", {}, resume=bool(saved)) as work,
            ):
                result = run(model, order, inputs, schedule, pause=pause, work=work)
                break
        assert len(saved) > 1
        assert len(saved) == len(set(saved)), "no block is finished twice"
        assert result.records == expected.records
        assert result.states.keys() == expected.states.keys()
        for name, state in result.states.items():
            state.check(name)
            assert torch.equal(state.weight, expected.states[name].weight)
            assert torch.equal(state.mask, expected.states[name].mask)
            assert state.notes == expected.states[name].notes
            assert same(state.inputs, expected.states[name].inputs)
        assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(model(**inputs[0]).to_tuple()[0], outputs)

    def test_the_layers_of_a_finished_block_are_not_compressed_again(
        self, make_model, batches, tmp_path, run, killed_after, applied
    ):
        for pause in PAUSES:
            applied.clear()
            killed_after(3)  # all of the first stage, one block of the second
            for resume in (False, True):
                with (
                    contextlib.suppress(killed_after.Killed),
                    WorkDir(tmp_path / pause, {}, resume=resume) as work,
                ):
                    run(make_model("llama"), "wanda:0.5 > gptq:4", batches, pause=pause, work=work)
                killed_after(9)
            twice = {key for key, count in applied.items() if count > 1}
            assert len(applied) == 2 * 14
            assert {name.split(".")[2] for name, _ in twice} == {"1"}
            assert {stage for _, stage in twice} == {"gptq:4"}

    @pytest.mark.parametrize("again", [False, True])
    def test_no_weight_of_a_layer_that_was_only_pruned_is_on_the_disk(
        self, make_model, batches, tmp_path, run, weights_of, again
    ):
        """A run may also continue what another left, and be resumed in its turn."""
        model = make_model("llama")
        order = "wanda:0.3 > magnitude:0.5"
        start = run(make_model("llama"), "sparsegpt:0.2", batches) if again else None

        def once(resume):
            with WorkDir(tmp_path / "work", {}, resume=resume) as work:
                return run(model, order, batches, start=start, work=work)

        result = once(resume=False)
        files = sorted((tmp_path / "work").glob("*.state.safetensors"))
        packed = {}
        for file in files:
            packed.update(snapshot.load(file)["states"])
        assert packed.keys() == result.states.keys()
        assert all(state.weight is None for state in packed.values())
        for name, state in result.states.items():
            assert packed[name].pruned.numel() == -(-state.weight.numel() // 8)
        model.load_state_dict(make_model("llama").state_dict())
        resumed = once(resume=True)
        weights = weights_of(model)
        for name, state in result.states.items():
            assert torch.equal(resumed.states[name].weight, state.weight)
            assert torch.equal(resumed.states[name].mask, state.mask)
            assert torch.equal(weights[name], state.weight)


class TestDevice:
    @pytest.mark.parametrize(
        ("architecture", "order"),
        [
            ("llama", "mixed_precision:4"),
            ("gpt2", "gptq:3 > wanda:0.5"),
            ("mixtral", "sparsegpt:0.5 > gptq:4"),
            ("llama", "rtn:4"),
        ],
    )
    @pytest.mark.parametrize("where", ["cpu:0", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_blocks_are_brought_to_the_device_and_back(
        self, make_model, batches, run, architecture, order, where
    ):
        """To torch "cpu:0" is not "cpu": without a GPU all moves are made too, if only in place."""
        if where == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        kind = torch.device(where).type
        for pause in PAUSES:
            expected = run(make_model(architecture), order, batches, pause=pause)
            model = make_model(architecture)
            units = find_units(model)
            devices = set()
            forward = type(units[0].module).forward

            def watched(module, hidden, *args, forward=forward, devices=devices, **kwargs):
                devices.add((hidden.device.type, next(module.parameters()).device.type))
                return forward(module, hidden, *args, **kwargs)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(units[0].module), "forward", watched)
                recipe = Recipe.of(Order.parse(order))
                execution = Execution(device=torch.device(where), dtype=torch.float32, pause=pause)
                result = run_recipe(Subject(model, units, batches), recipe, execution)
            assert devices == (set() if order == "rtn:4" else {(kind, kind)})
            assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
            addresses = {t.view.data_ptr() for unit in units for t in unit.targets}
            for name, state in expected.states.items():
                weight = result.states[name].weight
                assert weight.device.type == "cpu"
                assert weight.data_ptr() not in addresses
                if kind == "cpu":
                    assert torch.equal(weight, state.weight)
                    continue
                # Other sums round some weights of a random model the other way, and as well.
                errors = [record.relative_error for record in expected.records[name]]
                others = [record.relative_error for record in result.records[name]]
                assert others == pytest.approx(errors, rel=0.05)
            assert not torch.is_inference(next(model.parameters()))


SHARED = [
    ("llama", "wanda:0.5 > gptq:4", {}, 3),
    ("llama", "wanda:0.5 > gptq:4", {"schedule": "block", "pause": "group"}, 2),
    ("llama", "magnitude:0.5 > rtn:4", {}, 3),
    ("mixtral", "sparsegpt:0.5 > gptq:4", {}, 3),
    ("gpt_oss", "gptq:4", {"pause": "group"}, 2),
    ("llama", "gptq(bits=3, drift=0.5)", {"pause": "group"}, 2),
    ("llama", "mixed_precision:4", {}, 2),
    ("llama", "ecsq:3", {}, 2),
    ("llama", "sparsegpt(sparsity=0.5, allocation=global)", {}, 2),
    ("llama", "width:0.25 > gptq:4", {}, 2),
    ("llama", "gptq:8 > heads:0.5", {}, 2),
    ("llama", "depth:1 > gptq:4", {"blocks": 4}, 2),
    ("qwen3_moe", "experts:0.5 > gptq:4", {}, 7),
    ("llama", "rotate > gptq:4", {}, 2),
    ("llama", "gptq:3 > refit", {}, 2),
    ("llama", "gptq:3 > distill(steps=2)", {}, 2),
    ("llama", "activations(bits=8, per=tensor) > gptq:4", {}, 2),
    ("llama", "equalize > gptq:4", {}, 2),
]
"""A stage of every kind, with options of a run, and a number of processes. There are 5 samples."""


@pytest.fixture
def shared_run(make_model, run, batches):
    """`shared_run("llama", "gptq:4", ranks)`: the layers, records, grids and parameters after it."""

    def compress(architecture, order, ranks, blocks=2, schedule="stage", **options):
        def make():
            return make_model(architecture, num_hidden_layers=blocks)

        model = make()
        options |= {"dtype": torch.float32, "original": make, "ranks": ranks}
        result = run(model, order, batches, schedule, **options)
        layers = {name: (s.weight, s.mask) for name, s in result.states.items()}
        records = {
            name: [(one.stage, one.relative_error) for one in records]
            for name, records in result.records.items()
        }
        grids = {name: s.grid and type(s.grid).__name__ for name, s in result.states.items()}
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return layers, records, grids, parameters

    return compress


class TestRanks:
    @pytest.mark.parametrize(
        "cases", [SHARED[:4], pytest.param(SHARED[4:], marks=pytest.mark.slow)], ids=["few", "all"]
    )
    def test_share_a_run_of_every_kind_of_stage(self, shared_run, in_ranks, cases):
        """All ranks end with the same bits, and as one process does within float summation.

        A weight can end elsewhere only where its value before rounding, or its score, lies within
        the rounding of the sums of the border between two results: fewer than one in 500. That
        changes errors of layers, of four digits, by less than a fiftieth.
        """
        for architecture, order, options, size in cases:
            alone = shared_run(architecture, order, Ranks(), **options)

            def compress(ranks, architecture=architecture, order=order, options=options):
                return shared_run(architecture, order, ranks, **options)

            ends = in_ranks(size, compress)
            layers, records, grids, parameters = ends[0]
            for others in ends[1:]:
                assert others[1:3] == (records, grids)
                for name, tensors in layers.items():
                    assert all(map(torch.equal, tensors, others[0][name])), (order, name)
                for name, parameter in parameters.items():
                    assert torch.equal(parameter, others[3][name]), (order, name)
            assert (layers.keys(), grids) == (alone[0].keys(), alone[2])
            moved = count = 0
            for name, (weight, mask) in alone[0].items():
                in_model = parameters.get(f"{name}.weight", layers[name][0])
                assert torch.equal(layers[name][0], in_model), (order, name)
                apart = (layers[name][0] - weight).abs() > 1e-4 * weight.abs().max()
                moved += (apart | (layers[name][1] != mask)).sum().item()
                count += weight.numel()
                stages, errors = zip(*records[name], strict=True)
                expected, others = zip(*alone[1][name], strict=True)
                assert stages == expected and errors == pytest.approx(others, rel=0.02), order
            assert moved <= count / 500, (order, moved, count)

    def test_a_transform_of_another_rounding_is_the_first_process_s(
        self, shared_run, in_ranks, monkeypatch
    ):
        transform = rewrite.transform

        def rounding(method, model, batches):
            sizes = transform(method, model, batches)
            with torch.no_grad():
                for parameter in model.parameters():  # as another kind of processor would
                    parameter.mul_(1 + 1e-6 * int(os.environ["RANK"]))
            return sizes

        monkeypatch.setattr(rewrite, "transform", rounding)
        ends = in_ranks(2, lambda ranks: shared_run("llama", "rotate > rtn:8", ranks)[3])
        for name, parameter in ends[0].items():
            assert torch.equal(parameter, ends[1][name]), name

    def test_every_layer_is_compressed_in_one_process(self, shared_run, in_ranks, monkeypatch):
        compressed = []
        apply = Backend.apply

        def counted(backend, state, statistics, *, where):
            compressed.append(where)
            return apply(backend, state, statistics, where=where)

        monkeypatch.setattr(Backend, "apply", counted)

        def names(ranks):
            shared_run("llama", "gptq:4", ranks)
            return compressed

        shares = in_ranks(2, names)
        assert len(set(shares[0])) == len(shares[0]) > 3 and len(shares[1]) > 3
        assert not set(shares[0]) & set(shares[1])
        assert len(shares[0]) + len(shares[1]) == 14

    def test_a_run_that_is_cut_off_goes_on_in_another_number(
        self, make_model, run, batches, in_ranks, tmp_path
    ):
        """Of the same number with the same bits, of another within float summation."""
        order = "wanda:0.5 > gptq:4 > sparsegpt:0.6"
        save = WorkDir.write

        def compress(ranks, folder=None, resume=False, cut=None):
            work = None
            if folder is not None:
                facts = {"order": order, "processes": ranks.size, "threads": ranks.size}
                if ranks.rank == 0:
                    work = WorkDir(folder, facts, resume=resume)
                ranks.wait()
                work = work or FollowedWorkDir(folder, facts)
            saves = itertools.count()

            def failing(self, *args):
                if next(saves) == cut:
                    raise OutputError("full")
                save(self, *args)

            model = make_model("llama")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(WorkDir, "write", failing)
                context = pytest.raises((OutputError, RankError)) if cut is not None else None
                with context or contextlib.nullcontext():
                    run(model, order, batches, work=work, ranks=ranks, dtype=torch.float32)
            if work is not None:
                work.close()
            if cut is not None and ranks.rank == 0:
                return None  # the others notice that it has ended
            return {t.name: t.read() for unit in find_units(model) for t in unit.targets}

        whole = in_ranks(2, compress)[0]
        for cut, size in ((1, 2), (2, 1), (3, 3), (4, 2)):
            folder = tmp_path / str(cut)

            def cut_off(ranks, folder=folder, cut=cut):
                compress(ranks, folder, cut=cut if ranks.rank == 0 else None)

            with pytest.raises(AssertionError, match="RankError"):
                in_ranks(2, cut_off)
            ends = in_ranks(size, lambda ranks, f=folder: compress(ranks, f, resume=True))
            for end in ends:
                for name, weight in whole.items():
                    assert torch.equal(end[name], ends[0][name])
                    if size == 2:
                        assert torch.equal(end[name], weight), (cut, name)
                    else:
                        moved = (end[name] - weight).abs() > 1e-4 * weight.abs().max()
                        assert moved.sum() <= weight.numel() / 500, (cut, size, name)

    def test_a_statistic_that_does_not_say_how_it_merges_is_refused(self, make_model, run, batches):
        class Unmerged(SquaredNorms):
            merges: ClassVar = {}

        class Asks(Backend):
            name = "asks"
            summary = "ask for what cannot be merged"
            kind = "prune"
            needs = frozenset({Unmerged})
            Options = method(Stage("wanda", 0.5)).Options

            def compress(self, state, statistics):
                return state

        recipe = Recipe((Asks(Stage("asks", 0.5)),))
        refuse(recipe, streams=False)
        with pytest.raises(OrderError, match=r"cannot run in 2 processes: the statistic Unmerged"):
            refuse(recipe, streams=False, processes=2)
