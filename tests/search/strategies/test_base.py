"""What strategies share: few samples, small draws."""

import dataclasses

import torch

from optimum_order.data.arguments import Arguments

CALIBRATED = ["wanda:0.5", "rtn:4"]


def test_a_few_samples_lie_all_over(make_task):
    task = make_task(CALIBRATED)
    samples = task.few_samples()
    assert len(samples) == 128 // 8
    assert samples.ids.tolist() == task.scoring.samples.ids[::8].tolist()


def test_samples_of_any_kind_have_a_few(make_task, scoring):
    """Sound is given as arguments of a forward, which are neither windows nor images."""
    samples = Arguments({"input_ids": scoring.samples.ids}, "made up")
    task = make_task(CALIBRATED, scoring=dataclasses.replace(scoring, samples=samples))
    assert len(task.few_samples()) == 128 // 8
    assert task.few_calibration_samples() == 4


def test_small_draws_are_disjoint_parts_of_a_few_calibration_samples(make_task):
    task = make_task(CALIBRATED)
    draws = task.small_draws()
    assert [len(batch["input_ids"]) for (batch,) in draws] == [1, 1, 1, 1]
    (whole,) = task.runner.batches(0, 4)
    together = torch.cat([batch["input_ids"] for (batch,) in draws])
    assert sorted(together.tolist()) == sorted(whole["input_ids"].tolist())


def test_a_task_is_told_by_its_methods(make_task):
    assert make_task(CALIBRATED).calibrates
    assert not make_task(["magnitude:0.5", "rtn:4"]).calibrates
    assert make_task(CALIBRATED).single_layers
    assert not make_task(["magnitude:0.5", "mixed_precision:4"]).single_layers
