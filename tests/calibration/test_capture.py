import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_order.calibration import capture as capture_module
from optimum_order.calibration.capture import Capture
from optimum_order.errors import InvariantError, ModelError
from optimum_order.layers.statistics import Gram, SquaredNorms
from optimum_order.models.units import Target


def linear(name, module):
    return Target(name, "linear", module)


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
    with Capture([Target("a", "conv1d", layer, transposed=True)], gram=True) as capture:
        layer(X)
    assert capture.statistics()["a"].tokens == 10
    assert torch.allclose(capture.statistics()["a"].gram.double(), gram_of(X), atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_of_a_fused_parameter_is_seen_alone(X, transposed):
    parameter = nn.Parameter(torch.randn(3, 4, 6) if transposed else torch.randn(3, 6, 4))
    module = nn.ParameterDict({"up": parameter})
    targets = [Target(f"experts.{i}", "expert", module, "up", transposed, i) for i in range(3)]
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


@pytest.mark.parametrize(
    "product", [torch.matmul, torch.mm, torch.Tensor.matmul, lambda a, b: a @ b]
)
def test_every_way_of_multiplying_is_seen(product, X):
    parameter = nn.Parameter(torch.randn(4, 6))
    module = nn.ParameterDict({"weight": parameter})
    with Capture([Target("a", "conv1d", module, transposed=True)], gram=True) as capture:
        product(X[0], parameter)
    assert capture.statistics()["a"].tokens == 5


def conv_targets(name, module):
    if module.groups == 1:
        return [Target(name, "conv2d", module)]
    size = module.out_channels // module.groups
    rows = [range(i * size, (i + 1) * size) for i in range(module.groups)]
    return [
        Target(f"{name}.weight.{i}", "conv2d", module, rows=each)
        for i, each in enumerate(rows)
    ]


CONVOLUTIONS = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 3), "padding": (0, 1), "dilation": (1, 2)},
    {"kernel_size": 3, "dilation": 2},
    {"kernel_size": 7, "stride": 2, "padding": 3, "bias": False},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": (1, 3), "stride": (1, 2), "groups": 4},
]


@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel"
)  # what torch has to say about one of them
@pytest.mark.parametrize("together", [2**24, 1])
@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_a_convolution_is_a_product_with_patches(options, together, monkeypatch):
    """tr(dW H dW^T) is the squared change of what the convolution computes, all groups together."""
    monkeypatch.setattr(capture_module, "_MOST_UNFOLDED", together)
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(8, 12, **options).double()
    batches = [torch.randn(count, 8, 9, 11, generator=generator).double() for count in (3, 1)]
    targets = conv_targets("a", layer)
    capture = Capture(targets, gram=True)
    with torch.no_grad():
        for x in batches:
            with capture:
                layer(x)
        before = torch.cat([layer(x) for x in batches])
        deltas = [
            torch.randn(target.view.shape, generator=generator).double() for target in targets
        ]
        for target, delta in zip(targets, deltas, strict=True):
            target.write(target.read() + delta)
        after = torch.cat([layer(x) for x in batches])
    seen = capture.statistics()
    assert {statistics.tokens for statistics in seen.values()} == {before[:, 0].numel()}
    predicted = [
        seen[target.name].squared_error(delta)
        for target, delta in zip(targets, deltas, strict=True)
    ]
    assert sum(predicted) == pytest.approx((after - before).square().sum().item(), rel=1e-5)


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.just("valid"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    groups=st.sampled_from([1, 2]),
    size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
)
@settings(max_examples=40, deadline=None)
def test_any_convolution(kernel, stride, dilation, padding, groups, size):
    layer = nn.Conv2d(4, 2, kernel, stride, padding, dilation, groups, bias=False).double()
    x = torch.randn(2, 4, *size).double()
    targets = conv_targets("a", layer)
    with torch.no_grad(), Capture(targets, gram=True) as capture:
        out = layer(x)
    seen = capture.statistics()
    energy = sum(seen[target.name].squared_error(target.read()) for target in targets)
    assert energy == pytest.approx(out.square().sum().item(), rel=1e-5)


def test_a_convolution_called_by_names_and_on_one_image():
    weight, x = nn.Parameter(torch.randn(5, 4, 3, 3)), torch.randn(4, 6, 6)
    with Capture([Target("a", "conv2d", nn.ParameterDict({"weight": weight}))], gram=True) as capture:
        nn.functional.conv2d(x, weight=weight, stride=2, padding=[1])
    assert capture.statistics()["a"].tokens == 9
    assert tuple(capture.statistics()["a"].gram.shape) == (36, 36)


def test_one_group_can_be_watched_alone():
    layer = nn.Conv2d(8, 8, 3, groups=4)
    target = conv_targets("a", layer)[2]
    x = torch.randn(2, 8, 5, 5)
    with Capture([target], gram=True) as capture:
        layer(x)
    patches = nn.functional.unfold(x[:, 4:6], 3).transpose(1, 2)
    assert list(capture.statistics()) == ["a.weight.2"]
    assert torch.allclose(
        capture.statistics()["a.weight.2"].gram.double(), gram_of(patches), atol=1e-4
    )


def test_convolutions_share_an_accumulator_if_they_move_over_one_image_alike():
    """A ResNet's first convolution and its shortcut read one tensor, but not the same patches of it."""
    first, twin = (nn.Conv2d(4, 6, 3, stride=2, padding=1) for _ in range(2))
    shortcut, shifted = nn.Conv2d(4, 6, 1, stride=2), nn.Conv2d(4, 6, 3, stride=2, padding=0)
    layers = {"first": first, "twin": twin, "shortcut": shortcut, "shifted": shifted}
    capture = Capture(
        [target for name, module in layers.items() for target in conv_targets(name, module)],
        gram=True,
    )
    for x in (torch.randn(2, 4, 7, 7), torch.randn(1, 4, 7, 7)):
        with capture:
            for layer in layers.values():
                layer(x)
    assert capture.leaders == {
        "first": "first",
        "twin": "first",
        "shortcut": "shortcut",
        "shifted": "shifted",
    }
    assert [len(capture.statistics()[name].squared_norms) for name in ("first", "shortcut")] == [
        36,
        4,
    ]


def test_patches_are_cut_a_few_images_at_a_time(monkeypatch):
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(10, 4, 5, 5)
    monkeypatch.setattr(capture_module, "_MOST_UNFOLDED", 3 * 36 * 25)  # three images
    sizes = []
    monkeypatch.setattr(
        capture_module.Accumulator, "add", lambda self, rows: sizes.append(len(rows))
    )
    with Capture(conv_targets("a", layer), gram=True):
        layer(x)
    assert sizes == [75, 75, 75, 25]


def test_a_convolution_in_bfloat16_is_summed_in_float32():
    layer = nn.Conv2d(4, 6, 3).to(torch.bfloat16)
    x = torch.randn(2, 4, 5, 5).to(torch.bfloat16)
    with Capture(conv_targets("a", layer), gram=False) as capture:
        layer(x)
    patches = nn.functional.unfold(x.float(), 3)
    assert capture.statistics()["a"].squared_norms.dtype == torch.float32
    assert torch.allclose(
        capture.statistics()["a"].squared_norms, patches.square().sum((0, 2)), rtol=1e-5
    )


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
    with (
        pytest.raises(
            InvariantError, match="'k' shared its input with 'q' in one batch and not in the next"
        ),
        capture,
    ):
        q(X)
        k(X.clone())


def test_norms_alone_hold_no_matrix(layers, X):
    with Capture([linear("a", layers[0])], gram=False) as capture:
        layers[0](X)
    seen = capture.statistics()["a"]
    assert seen[Gram] is None
    assert torch.allclose(seen[SquaredNorms], X.square().sum((0, 1)))


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
    with pytest.raises(
        ModelError, match=r"The inputs of 'model\.q' are NaN or infinite on the calibration data"
    ):
        capture.statistics()
