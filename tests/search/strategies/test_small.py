"""Every order in full on small draws."""

import dataclasses

import pytest
import torch

from optimum_order.backends.learning import Student
from optimum_order.engine.recipe import Recipe
from optimum_order.engine.run import Subject, run
from optimum_order.search.strategies import auto, small
from optimum_order.search.strategies.base import Effort

STAGES = ["magnitude:0.5", "mixed_precision(bits=3, quantizer=rtn)"]


def test_scores_are_means_over_small_draws(make_task):
    task = make_task(STAGES)
    verdict = small.rank(task)
    assert task.cost == {"orders": 8, "calibration_samples": 4, "scored_samples": 16}
    assert verdict.difference.over == "draws and samples"
    assert "4 draws of 1 calibration samples and 16 windows" in verdict.reason
    best, score = verdict.ranking[0]
    runner = task.runner
    performances = []
    for batches in task.small_draws():
        runner.reset()
        run(
            Subject(runner.model, runner.units, batches),
            Recipe.of(best, "block"),
            runner.execution,
            start=runner.original,
        )
        samples = task.few_samples()
        performances.append(task.measure(task.scoring.metric, samples).performance)
    assert torch.tensor(performances).mean().item() == pytest.approx(score, rel=1e-5)


def test_stages_that_learn_cut_and_quantize_are_ranked_together(make_task, make_compressor):
    """A draw is as large as what learns and holds samples back needs."""
    task = make_task(["width(ratio=0.5, multiple=8)", "rtn:3", "distill(steps=3, rate=0.002)"])
    runner = make_compressor(calibration_samples=24).runner(progress=False)
    task = dataclasses.replace(task, runner=runner, effort=Effort(calibration_samples=24))
    assert [len(batch["input_ids"]) for (batch,) in task.small_draws()] == [5, 5, 5, 5]
    verdict = small.rank(task)
    assert {order for order, _ in verdict.ranking} == set(task.orders)
    scores = [score for _, score in verdict.ranking]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]


def test_what_learns_goes_over_each_sample_of_a_draw_as_often(
    make_task, make_compressor, monkeypatch
):
    steps = []
    step = Student.step
    monkeypatch.setattr(Student, "step", lambda *a: (steps.append(1), step(*a))[1])
    task = make_task(["rtn:3", "refit(steps=72, rate=0.002)"])
    runner = make_compressor(calibration_samples=24).runner(progress=False)
    task = dataclasses.replace(task, runner=runner, effort=Effort(calibration_samples=24))
    verdict = small.rank(task)
    assert len(steps) == 4 * (72 * 5 // 24)  # 4 draws of 5 samples; first, refit learns nothing
    assert "(with 'refit(steps=15)')" in verdict.reason
    assert {order for order, _ in verdict.ranking} == set(task.orders)


def test_auto_runs_stages_that_look_at_all_layers_in_small(make_task, monkeypatch):
    monkeypatch.setattr(small, "rank", lambda task: "ran in small")
    assert auto.rank(make_task(STAGES)) == "ran in small"
