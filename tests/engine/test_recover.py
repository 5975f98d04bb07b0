"""A recovery moves weights on the masks and codes that they have; anything else is refused."""

import contextlib
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.backends.learning import Student
from optimum_order.calibration.execution import PAUSES
from optimum_order.engine import run as run_module
from optimum_order.engine import snapshot, workdir
from optimum_order.engine.recipe import method
from optimum_order.engine.recover import recover
from optimum_order.engine.run import Subject
from optimum_order.engine.workdir import WorkDir
from optimum_order.errors import InvariantError, ModelError, OutputError
from optimum_order.models.units import find_units
from optimum_order.order import Stage
from optimum_order.progress import Bar

INPUTS = torch.arange(48).view(4, 12) % 61


def distance(model, original):
    """Return how far the layers of a model are from those of another."""
    pairs = zip(find_units(model), find_units(original), strict=True)
    targets = [pair for one, two in pairs for pair in zip(one.targets, two.targets, strict=True)]
    return sum((a.read() - b.read()).square().sum().item() for a, b in targets)


@pytest.mark.parametrize(
    "order", ["sparsegpt:0.5", "rtn(bits=2, clip=none)", "sparsegpt:0.5 > rtn:3"]
)
def test_layers_come_nearer_on_the_same_mask_and_codes(make_model, batches, run, plugins, order):
    """Sparsegpt moves the weights that stay, and plain rounding spans the extremes."""
    for pause in PAUSES:
        plain = make_model("llama")
        before = run(plain, order, batches, pause=pause)
        model = make_model("llama")
        result = run(
            model,
            f"{order} > mend",
            batches,
            pause=pause,
            original=lambda: make_model("llama"),
        )
        original = make_model("llama")
        assert distance(model, original) < 0.999 * distance(plain, original)
        targets = {t.name: t for unit in find_units(model) for t in unit.targets}
        for name, state in result.states.items():
            state.check(name)
            earlier = before.states[name]
            assert torch.equal(state.mask, earlier.mask)
            assert torch.equal(targets[name].read(), state.weight)
            if earlier.grid is not None:
                codes = earlier.grid.quantize(earlier.weight)
                assert torch.equal(state.grid.quantize(state.weight), codes)
            assert result.records[name][-1].stage == "mend:nothing"
            assert result.records[name][-1].relative_error > 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("mask", "the recovery changed the mask"),
        ("codes", "the recovery changed the layer's codes"),
        ("grid", "the recovery dropped or made a grid"),
    ],
)
def test_a_broken_promise_is_refused_by_name(make_model, batches, run, plugins, spoil, message):
    with pytest.raises(InvariantError, match=rf"q_proj, stage 'mend:{spoil}': {message}"):
        run(
            make_model("llama"),
            f"magnitude:0.5 > rtn:4 > mend:{spoil}",
            batches,
            original=lambda: make_model("llama"),
        )


def test_the_original_model_is_needed(make_model, plugins):
    model = make_model("llama")
    subject = Subject(model, find_units(model))
    with pytest.raises(ModelError, match="'mend:nothing' learns from the original model"):
        list(recover(method(Stage("mend")), subject, {}))


def test_from_the_front_door_to_a_saved_folder(make_model, plugins, tmp_path):
    original = make_model("llama")
    compressor = JointCompressor(original, device="cpu")
    plain = compressor.compress("rtn:3", progress=False)
    compressed = compressor.compress("rtn:3 > mend", progress=False)
    assert distance(compressed.model, original) < distance(plain.model, original)
    assert compressed.save_pretrained(tmp_path / "out") == "compressed-tensors"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUTS).logits, compressed.model(INPUTS).logits)


SMALLER = "width(ratio=0.5, multiple=8)"
CUT_OFF = [
    "wanda:0.5 > distill(steps=7, rate=0.002) > gptq:4",
    "rtn:3 > refit(steps=6, rate=0.01) > magnitude:0.5",
    "rtn:3 > lora(steps=5, rank=2, rate=0.01)",
    f"magnitude:0.3 > {SMALLER} > distill(steps=5, rate=0.002) > rtn:4 > refit:3",
    "rtn:3 > distill(steps=20, rate=0.9) > wanda:0.5",  # it diverges
    "rtn:4 > mend > wanda:0.5 > mend",
]


@pytest.fixture
def always_written(monkeypatch):
    """Have what is not finished written after each step."""
    monkeypatch.setattr(workdir, "SECONDS_BETWEEN", 0.0)
    monkeypatch.setattr(workdir, "_TIMES_WRITING", 0)


@pytest.fixture
def steps(monkeypatch):
    """The losses of all steps that students took."""
    losses = []
    step = Student.step

    def counted(self, batch, optimizer):
        losses.append(step(self, batch, optimizer))
        return losses[-1]

    monkeypatch.setattr(Student, "step", counted)
    return losses


@pytest.mark.parametrize("order", CUT_OFF)
def test_a_run_that_is_cut_off_at_any_step_ends_as_if_it_had_not_been(
    make_model, batches, run, plugins, tmp_path, killed_after, always_written, steps, order
):
    def make():
        return make_model("llama")

    killed_after(10**6)
    whole = make()
    expected = run(whole, order, batches, original=make)
    undisturbed = list(steps)
    steps.clear()
    folder = tmp_path / "work"
    tries = 0
    for files in itertools.cycle((2, 1, 3)):
        saved = killed_after(files)
        model = make()
        with (
            contextlib.suppress(killed_after.Killed),
            WorkDir(folder, {}, resume=folder.exists()) as work,
        ):
            result = run(model, order, batches, work=work, original=make)
            break
        tries += 1
    assert tries > 1
    done = [name for name in saved if not name.endswith(".learning.safetensors")]
    assert len(done) == len(set(done)), "nothing is finished twice"
    assert set(steps) == set(undisturbed), "the same losses on the way"
    assert len(steps) <= len(undisturbed) + tries, "no step but the last is taken twice"
    assert not list(folder.glob("*.learning.safetensors")), "what is finished takes no room"
    assert result.records == expected.records
    assert result.states.keys() == expected.states.keys()
    for name, state in result.states.items():
        state.check(name)
        other = expected.states[name]
        assert torch.equal(state.weight, other.weight)
        assert torch.equal(state.mask, other.mask)
        assert state.notes == other.notes
        assert (state.adapter is None) == (other.adapter is None)
        if state.adapter is not None:
            assert torch.equal(state.adapter.a, other.adapter.a)
            assert torch.equal(state.adapter.b, other.adapter.b)
    ends = whole.state_dict()
    assert model.state_dict().keys() == ends.keys()
    assert all(torch.equal(value, ends[name]) for name, value in model.state_dict().items())


def test_what_is_on_the_way_is_kept_now_and_then(
    make_model, batches, run, tmp_path, monkeypatch, steps
):
    """By time: a step may take a millisecond or a minute."""
    clock = itertools.count(0.0, 25.0)
    monkeypatch.setattr(workdir, "monotonic", lambda: next(clock))
    at = []
    save = snapshot.save

    def write(value, file, **options):
        if file.name.endswith(".learning.safetensors"):
            at.append(len(steps))
        return save(value, file, **options)

    monkeypatch.setattr(snapshot, "save", write)
    with WorkDir(tmp_path / "work", {}, resume=False) as work:
        run(
            make_model("llama"),
            "rtn:2 > distill(steps=50, rate=0.001)",
            batches,
            work=work,
            original=lambda: make_model("llama"),
        )
    # after a minute; then a write takes 25 s, and 20 times as long passes until the next
    assert at == [3, 23, 43]


class TestOfAnotherRun:
    @pytest.fixture
    def begun(self, make_model, tmp_path, killed_after, always_written):
        """`begun(order, data)`: compress in the work dir, cut off on the way of `distill`."""

        def compress(order, data, files, resume):
            killed_after(files)
            compressor = JointCompressor(
                make_model("llama"), calibration=data, sequence_length=8, device="cpu"
            )
            return compressor.compress(
                order, work_dir=tmp_path / "work", resume=resume, progress=False
            )

        with contextlib.suppress(killed_after.Killed):
            compress(
                "rtn:3 > distill(steps=9, rate=0.01)", INPUTS.view(-1)[:48].view(6, 8), 5, False
            )
        assert list((tmp_path / "work").glob("*.learning.safetensors"))
        return compress

    def test_other_options_or_data_are_refused(self, begun):
        data = INPUTS.view(-1)[:48].view(6, 8)
        with pytest.raises(OutputError, match=r"holds a run whose order was .*steps=9.*steps=8"):
            begun("rtn:3 > distill(steps=8, rate=0.01)", data, 10**6, True)
        with pytest.raises(OutputError, match=r"holds a run whose calibration\.digest was"):
            begun("rtn:3 > distill(steps=9, rate=0.01)", data + 1, 10**6, True)

    def test_a_damaged_file_is_one_line(self, begun, tmp_path):
        (file,) = (tmp_path / "work").glob("*.learning.safetensors")
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(OutputError, match=r"learning\.safetensors' is damaged: remove"):
            data = INPUTS.view(-1)[:48].view(6, 8)
            begun("rtn:3 > distill(steps=9, rate=0.01)", data, 10**6, True)


def test_the_progress_counts_on_every_round_from_the_start(make_model, batches, run, monkeypatch):
    bars = []

    class Noted(Bar):
        def __init__(self, **options):
            bars.append(self)
            super().__init__(**options)
            self.named, self.totals, self.done = options["unit"], [self.total], 0

        def update(self, n=1):
            self.totals.append(self.total)
            self.done += n
            return super().update(n)

    monkeypatch.setattr(run_module, "Bar", Noted)
    blocks = len(find_units(make_model("llama")))
    run(
        make_model("llama"),
        "magnitude:0.5 > refit(steps=7, batch_size=1)",
        batches,
        original=lambda: make_model("llama"),
    )
    (bar,) = bars
    assert set(bar.totals) == {blocks + 7}
    assert (bar.done, bar.named) == (blocks + 7, "step")
