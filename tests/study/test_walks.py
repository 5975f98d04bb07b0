"""What a study learns from the blocks of the original model."""

import pytest
import torch

from optimum_order.layers.statistics import Gram
from optimum_order.order import Order
from optimum_order.study import walks
from optimum_order.study.walks import error_correlations, input_statistics


@pytest.fixture(scope="module")
def study(make_study, tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("study"))


def test_statistics_are_of_the_original_model(study):
    """Whatever weights an earlier order left in the model."""
    runner = study.runner
    batches = runner.batches(1)
    inputs = []
    hook = runner.model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: inputs.append(args[0])
    )
    runner.reset()
    with torch.no_grad():
        for batch in batches:
            runner.model(**batch)
    hook.remove()
    rows = torch.cat([x.flatten(0, 1) for x in inputs])
    runner.run(Order.parse("rtn:2"))
    statistics = input_statistics(runner, 1)
    assert set(statistics) == set(runner.original.states)
    gram = statistics["model.layers.1.mlp.up_proj"][Gram]
    assert torch.allclose(gram, rows.T @ rows, rtol=0.02, atol=0.02 * gram.diagonal().mean())


def test_no_statistics_where_memory_would_not_suffice(study, monkeypatch):
    widths = [state.weight.shape[1] for state in study.runner.original.states.values()]
    size = sum(4 * width**2 for width in widths)
    monkeypatch.setattr(walks, "_MOST_GRAM_BYTES", size)
    assert input_statistics(study.runner, 0)
    monkeypatch.setattr(walks, "_MOST_GRAM_BYTES", size - 1)
    assert input_statistics(study.runner, 0) == {}


def test_correlations_are_of_errors_that_blocks_make_alone(study):
    runner = study.runner
    states = runner.run(Order.parse("rtn:2")).result.states
    matrix = torch.tensor(error_correlations(runner, states))
    # the second block, run on what the original first block gives
    runner.reset()
    batch = runner.batches(0)[0]
    with torch.no_grad():
        before = runner.model(**batch, output_hidden_states=True).hidden_states
    errors = []
    for number, unit in enumerate(runner.units):
        for target in unit.targets:
            target.write(states[target.name].weight)
        block = runner.model.model.layers[number]
        rotary = runner.model.model.rotary_emb
        hidden = before[number]
        positions = torch.arange(hidden.shape[1])[None]
        with torch.no_grad():
            after = block(hidden, position_embeddings=rotary(hidden, positions))
            runner.reset()
            original = block(hidden, position_embeddings=rotary(hidden, positions))
        errors.append((after - original).flatten().double())
    cosine = torch.nn.functional.cosine_similarity(*errors, dim=0).item()
    assert matrix.shape == (2, 2)
    assert torch.equal(matrix, matrix.T)
    assert matrix.diagonal().tolist() == pytest.approx([1, 1])
    assert matrix[0, 1].item() == pytest.approx(cosine, abs=0.02)
    assert abs(cosine) < 1


def test_a_block_without_an_error_correlates_with_none(study):
    states = dict(study.runner.original.states)
    assert error_correlations(study.runner, states) == [[None, None], [None, None]]
