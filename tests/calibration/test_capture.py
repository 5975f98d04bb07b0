import weakref

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_order.calibration.capture import Capture
from optimum_order.errors import InvariantError, ModelError
from optimum_order.targets import Target


def linear(name, module):
    return Target(name, "linear", module.weight)


@pytest.fixture
def layers():
    return [nn.Linear(4, 3, bias=bias) for bias in (True, False, True)]


@pytest.fixture
def X():
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def gram_of(x):
    rows = x.reshape(-1, x.shape[-1]).double()
    return rows.T @ rows


def test_a_linear_layer_is_seen(layers, X):
    with Capture([linear("a", layers[0])], gram=True) as capture:
        layers[0](X)
        layers[1](X)  # not watched
    seen = capture.statistics()
    assert list(seen) == ["a"]
    assert seen["a"].tokens == 10
    assert torch.allclose(seen["a"].gram.double(), gram_of(X), atol=1e-5)


def test_a_conv1d_is_seen(X):
    layer = Conv1D(3, 4)
    with Capture([Target("a", "conv1d", layer.weight, transposed=True)], gram=True) as capture:
        layer(X)
    assert capture.statistics()["a"].tokens == 10
    assert torch.allclose(capture.statistics()["a"].gram.double(), gram_of(X), atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_of_a_fused_parameter_is_seen_alone(X, transposed):
    parameter = nn.Parameter(torch.randn(3, 4, 6) if transposed else torch.randn(3, 6, 4))
    targets = [Target(f"experts.{i}", "expert", parameter, transposed, i) for i in range(3)]
    with Capture(targets, gram=True) as capture:
        for i, rows in [(torch.tensor(0), X[0]), (torch.tensor(2), X[1, :2])]:
            if transposed:
                rows @ parameter[i]
            else:
                nn.functional.linear(rows, parameter[i])
    seen = capture.statistics()
    assert [seen[f"experts.{i}"].tokens for i in range(3)] == [5, 0, 2]
    assert torch.allclose(seen["experts.2"].gram.double(), gram_of(X[1, :2]), atol=1e-5)
    assert not seen["experts.1"].gram.any()
    assert set(capture.leaders) == {"experts.0", "experts.2"}


@pytest.mark.parametrize("product", [torch.matmul, torch.mm, torch.Tensor.matmul, lambda a, b: a @ b])
def test_every_way_of_multiplying_is_seen(product, X):
    parameter = nn.Parameter(torch.randn(4, 6))
    with Capture([Target("a", "conv1d", parameter, transposed=True)], gram=True) as capture:
        product(X[0], parameter)
    assert capture.statistics()["a"].tokens == 5


def test_layers_that_read_one_tensor_share_one_accumulator(layers, X):
    q, k, o = layers
    names = [linear("q", q), linear("k", k), linear("o", o)]
    capture = Capture(names, gram=True)
    for batch in (X, X[:1] + 1):
        with capture:
            q(batch)
            k(batch)
            o(batch.clone())
    assert capture.leaders == {"q": "q", "k": "q", "o": "o"}
    assert set(capture.accumulators) == {"q", "o"}
    seen = capture.statistics()
    assert seen["q"] is seen["k"]
    assert seen["q"].tokens == seen["o"].tokens == 15
    assert torch.equal(seen["q"].gram, seen["o"].gram)


def test_the_same_values_elsewhere_in_memory_are_another_input(layers, X):
    first, second, _ = layers
    with Capture([linear("a", first), linear("b", second)], gram=False) as capture:
        first(X[0])
        second(X[1])
    assert capture.leaders == {"a": "a", "b": "b"}


def test_sharing_in_one_batch_alone_is_refused(layers, X):
    q, k, _ = layers
    capture = Capture([linear("q", q), linear("k", k)], gram=True)
    with capture:
        q(X)
        k(X)
    with pytest.raises(InvariantError, match="'k' shared its input with 'q' in one batch and not in the next"), capture:
        q(X)
        k(X.clone())


def test_norms_alone_hold_no_matrix(layers, X):
    with Capture([linear("a", layers[0])], gram=False) as capture:
        layers[0](X)
    seen = capture.statistics()["a"]
    assert seen.gram is None
    assert torch.allclose(seen.squared_norms, X.square().sum((0, 1)))


def test_outputs_are_untouched_and_nothing_is_seen_afterwards(layers, X):
    layer = layers[0]
    expected = layer(X)
    with Capture([linear("a", layer)], gram=True) as capture:
        assert torch.equal(layer(X), expected)
    layer(X)
    assert capture.statistics()["a"].tokens == 10


def test_no_input_is_held_afterwards(layers):
    X = torch.randn(2, 4)
    held = weakref.ref(X)
    with Capture([linear("a", layers[0])], gram=True) as capture:
        layers[0](X)
        del X
    assert held() is None
    assert capture.statistics()["a"].tokens == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_no_numbers_are_refused_by_name(layers, X, value):
    X[1, 2, 3] = value
    with Capture([linear("model.q", layers[0])], gram=True) as capture:
        layers[0](X)
    with pytest.raises(ModelError, match=r"The inputs of 'model\.q' are NaN or infinite on the calibration data"):
        capture.statistics()
