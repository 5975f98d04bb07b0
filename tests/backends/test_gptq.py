import pytest
import torch

from optimum_order.backends.gptq import GPTQ
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError
from optimum_order.layers.grids.uniform import UniformGrid
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram
from optimum_order.order import Stage
from optimum_order.testing import DTYPES, BackendContract


class TestContract(BackendContract):
    backend = GPTQ
    stages = (
        "gptq:4",
        "gptq(bits=3, group_size=16, symmetric=false)",
        "gptq(bits=8, act_order=false, clip=none, symmetric=false, damping=0.1)",
    )


def reference(weight, gram, grid, order, pruned):
    """GPTQ in float64 with explicit inverses, a column at a time."""
    W = weight.double().clone()
    free = list(order)
    identity = torch.eye(len(gram), dtype=torch.float64)
    H = gram.double() + 0.01 * gram.double().diagonal().mean() * identity
    while free:
        j = free[0]
        inverse = torch.linalg.inv(H[free][:, free])
        q = grid.nearest(W[:, j : j + 1].float(), slice(j, j + 1))[:, 0].double()
        q = q.masked_fill(pruned[:, j], 0)
        W[:, free] -= torch.outer((W[:, j] - q) / inverse[0, 0], inverse[0])
        W[:, j] = q
        free = free[1:]
    return W


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize(("width", "symmetric"), [(32, True), (144, False)])
def test_is_the_papers_method(inputs, gaussian, row_errors, act_order, sparsity, width, symmetric):
    statistics = inputs("correlated", 4 * width, width)
    before = method(Stage("magnitude", sparsity)).apply(LayerState(gaussian(8, width)))
    clip = "mse" if symmetric else "none"
    options = {"bits": 3, "group_size": 16, "symmetric": symmetric, "clip": clip}
    state = method(Stage("gptq", **options, act_order=act_order)).apply(before, statistics)
    grid = UniformGrid.fit(before.weight, **options)
    largest = sorted(range(width), key=lambda j: -statistics[Gram][j, j].item())
    order = largest if act_order else range(width)
    expected = reference(before.weight, statistics[Gram], grid, order, before.pruned)
    plain = grid.nearest(before.weight)
    errors = [row_errors(after, before.weight, statistics) for after in (expected, plain)]
    better = errors[0] < errors[1]
    assert better.float().mean() > 0.5
    assert torch.equal(grid.scale, state.grid.scale)
    expected = torch.where(better[:, None], expected, plain.double())
    assert torch.allclose(state.weight.double(), expected, atol=1e-6)


def test_a_pruned_layer_stays_zero_where_pruned_and_beats_rounding(
    inputs, gaussian, row_errors, not_worse, input_kinds
):
    """Removed weights drift while earlier columns are fixed; their own turn hands the drift on."""
    for kind in input_kinds:
        for dtype in DTYPES:
            case = f"{kind}, {dtype}"
            statistics = inputs(kind)
            start = LayerState(gaussian(dtype=dtype))
            before = method(Stage("wanda", 0.5)).apply(start, statistics)
            gptq = method(Stage("gptq", 3)).apply(before, statistics)
            rtn = method(Stage("rtn", 3)).apply(before)
            assert torch.equal(gptq.pruned, before.pruned), case
            assert not gptq.weight[before.pruned].any(), case
            assert not torch.signbit(gptq.weight[before.pruned]).any(), case
            deltas = [state.weight - before.weight for state in (gptq, rtn)]
            mine = row_errors(gptq.weight, before.weight, statistics)
            plain = row_errors(rtn.weight, before.weight, statistics)
            assert not_worse(mine, plain, deltas, statistics), case
            if kind in ("correlated", "low rank"):
                assert mine.sum() < 0.8 * plain.sum(), case


def test_drift_of_removed_weights_is_passed_on(inputs, gaussian, row_errors):
    """Forcing them to zero without passing it on would be worse on correlated inputs."""
    statistics = inputs("correlated", 256, 64)
    before = method(Stage("magnitude", 0.5)).apply(LayerState(gaussian(32, 64)))
    state = method(Stage("gptq", 4)).apply(before, statistics)
    dense = method(Stage("gptq", 4)).apply(LayerState(before.weight), statistics)
    forced = dense.weight.masked_fill(before.pruned, 0.0)
    mine = row_errors(state.weight, before.weight, statistics).sum()
    assert mine < 0.8 * row_errors(forced, before.weight, statistics).sum()


def test_act_order_starts_with_the_largest_inputs(inputs, gaussian, row_errors):
    """The column of one huge input is rounded first: no other pushes it off its nearest value."""
    statistics = inputs("outliers", 256)
    largest = statistics[Gram].diagonal().argmax()
    state = method(Stage("gptq", 2)).apply(LayerState(gaussian()), statistics)
    assert torch.equal(state.weight[:, largest], state.grid.nearest(gaussian())[:, largest])


def test_rounds_to_nearest_where_no_token_came_by(inputs, gaussian):
    state = method(Stage("gptq", 3)).apply(LayerState(gaussian()), inputs("silent", tokens=0))
    assert torch.equal(state.weight, method(Stage("rtn", 3)).apply(LayerState(gaussian())).weight)
    assert state.notes == (
        "gptq:3: no calibration token reached this layer; its inputs were taken as white noise",
    )


@pytest.mark.parametrize("damping", [0, -1, 1.5, "much"])
def test_damping_is_a_positive_fraction(damping):
    with pytest.raises(OrderError, match=r"'damping' .* must be in \(0, 1\]"):
        method(Stage("gptq", bits=4, damping=damping))
