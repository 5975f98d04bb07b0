"""Distillation brings a model nearer to the original, on the masks and grids that it has."""

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.backends.learning import Student
from optimum_order.errors import DataError, OrderError


@pytest.mark.parametrize(
    ("order", "part"),
    [
        ("magnitude:0.5", 0.4),
        ("rtn(bits=3, group_size=32)", 0.7),
        ("rtn(bits=3, group_size=32, symmetric=false)", 0.7),
        ("magnitude:0.4 > rtn(bits=4, group_size=-1)", 0.5),
        ("gptq(bits=2, group_size=32)", 1.0),  # a sweep has made up for most already
        ("ecsq:3", 1.0),
        ("width:0.5", 0.8),
    ],
)
def test_the_model_comes_nearer_and_keeps_its_mask_and_grid(order, part, learning):
    mine = learning.compressor()
    before = mine.compress(order, progress=False)
    after = mine.compress(f"{order} > distill(steps=60, rate=0.001)", progress=False)
    original = learning.make()
    assert learning.divergence(after.model, original) < part * learning.divergence(
        before.model, original
    )
    moved = 0
    for name, state in after.layers.items():
        state.check(name)
        earlier = before.layers[name]
        assert torch.equal(state.mask, earlier.mask), name
        assert not state.weight[state.mask].any()
        assert (state.grid is None) is (earlier.grid is None)
        if state.grid is not None:
            assert torch.equal(state.grid.nearest(state.weight), state.weight)
            assert torch.equal(state.grid.nearest(earlier.weight), earlier.weight), "other grid"
        moved += not torch.equal(state.weight, earlier.weight)
    assert moved
    assert torch.equal(after.model.model.norm.weight, original.model.norm.weight)


def test_experts_and_coded_embeddings_learn_too(learning):
    mine = learning.compressor(experts=True)
    order = "rtn(bits=3, group_size=32)"
    before = mine.compress(order, progress=False)
    after = mine.compress(f"{order} > distill(steps=20, rate=0.002)", progress=False)
    assert learning.divergence(after.model, learning.make(experts=True)) < learning.divergence(
        before.model, learning.make(experts=True)
    )
    tied = learning.compressor()
    order = "rtn(bits=3, group_size=32, targets=[*, *embed_tokens])"
    before = tied.compress(order, progress=False)
    stage = "distill(steps=20, rate=0.002, targets=[*, *embed_tokens])"
    after = tied.compress(f"{order} > {stage}", progress=False)
    name = "model.embed_tokens"
    assert not torch.equal(after.layers[name].weight, before.layers[name].weight)
    assert after.model.lm_head.weight is after.model.model.embed_tokens.weight
    assert learning.divergence(after.model, learning.make()) < learning.divergence(
        before.model, learning.make()
    )


def test_it_may_stand_between_stages_and_in_another_dtype(tmp_path, learning):
    mine = learning.compressor(dtype=torch.bfloat16)
    order = "wanda:0.5 > distill(steps=10, rate=0.002) > gptq(bits=4, group_size=32)"
    compressed = mine.compress(order, progress=False)
    compressed.save_pretrained(tmp_path / "out")
    assert [stage["method"] for stage in compressed.manifest["stages"]] == [
        "wanda",
        "distill",
        "gptq",
    ]
    assert all(state.weight.dtype == torch.bfloat16 for state in compressed.layers.values())
    assert all((state.weight[state.mask] == 0).all() for state in compressed.layers.values())


def test_what_diverges_is_stopped_and_the_best_state_taken(caplog, learning):
    mine = learning.compressor()
    before = mine.compress("rtn(bits=4, group_size=32)", progress=False)
    stages = "rtn(bits=4, group_size=32) > distill(steps=60, rate=0.9)"
    after = mine.compress(stages, progress=False)
    assert "diverged at step" in caplog.text
    original = learning.make()
    assert learning.divergence(after.model, original) <= 1.05 * learning.divergence(
        before.model, original
    )


def test_where_nothing_is_lost_nothing_changes(caplog, learning):
    mine = learning.compressor()
    after = mine.compress(
        "rtn(bits=8, group_size=32) > distill(steps=2, rate=1e-9)", progress=False
    )
    before = mine.compress("rtn(bits=8, group_size=32)", progress=False)
    assert "found no better state" in caplog.text
    for name, state in after.layers.items():
        assert torch.equal(state.weight, before.layers[name].weight)


class TestRefused:
    def test_options(self, learning):
        for stage, message in {
            "distill:0": "a positive integer",
            "distill(steps=3, rate=2.0)": "between 0 and 1",
        }.items():
            with pytest.raises(OrderError, match=message):
                learning.compressor().compress(f"rtn:4 > {stage}", progress=False)

    def test_too_few_samples(self, learning):
        few = JointCompressor(
            learning.make(), calibration=learning.ids[:4], sequence_length=16, device="cpu"
        )
        with pytest.raises(DataError, match="more than 4 samples"):
            few.compress("rtn(bits=4, group_size=32) > distill:5", progress=False)


def test_a_model_that_lost_nothing_has_nothing_to_learn(learning, caplog):
    mine = learning.compressor()
    before = mine.compress("wanda:0.5", progress=False)
    after = mine.compress("distill:20 > wanda:0.5", progress=False)
    assert "nothing to learn" in caplog.text and "diverged" not in caplog.text
    for name, state in after.layers.items():
        assert torch.equal(state.weight, before.layers[name].weight)


def test_a_step_sees_as_many_samples_as_asked_for(learning, monkeypatch):
    seen = []
    step = Student.step

    def counted(self, batch, optimizer):
        seen.append(len(batch["input_ids"]))
        return step(self, batch, optimizer)

    monkeypatch.setattr(Student, "step", counted)
    learning.compressor().compress("rtn:3 > distill(steps=3, batch_size=2)", progress=False)
    assert seen == [2, 2, 2]
