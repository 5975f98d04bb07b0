"""Every order in full on small draws."""

import pytest
import torch

from optimum_order.engine.recipe import Recipe
from optimum_order.engine.run import Subject, run
from optimum_order.search.strategies import auto, small

STAGES = ["magnitude:0.5", "mixed_precision(bits=3, quantizer=rtn)"]


def test_scores_are_means_over_small_draws(make_task):
    task = make_task(STAGES)
    verdict = small.rank(task)
    assert task.cost == {"orders": 8, "calibration_samples": 4, "scored_samples": 8}
    assert verdict.difference.over == "draws and samples"
    assert "4 draws of 1 calibration samples and 8 windows" in verdict.reason
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


def test_auto_runs_stages_that_look_at_all_layers_in_small(make_task, monkeypatch):
    monkeypatch.setattr(small, "rank", lambda task: "ran in small")
    assert auto.rank(make_task(STAGES)) == "ran in small"
