"""The mean over the tokens that an expert has, not over all."""

import torch

from optimum_order.layers.statistics import ExpertNorms

ROWS = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 0.0], [0.0, 4.0, 0.0]])


def gathered(*parts):
    norms = ExpertNorms(3, torch.device("cpu"))
    for part in parts:
        norms.update(part)
    return norms


def test_a_mean_is_of_the_tokens_of_the_expert():
    assert gathered(ROWS).result().tolist() == [2.0, 3.0, 0.0]
    assert gathered(ROWS[:1], ROWS[1:]).result().tolist() == [2.0, 3.0, 0.0]
    assert gathered(ROWS[:0]).result().tolist() == [0.0, 0.0, 0.0]


def test_processes_are_merged():
    norms = gathered(ROWS[:2])
    norms.merge(gathered(ROWS[2:]))
    assert norms.result().tolist() == [2.0, 3.0, 0.0]
    assert ExpertNorms.isotropic(norms.result()).tolist() == [1.0, 1.0, 1.0]
