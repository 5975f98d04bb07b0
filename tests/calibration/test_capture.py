"""A layer is recognized by its weight, in every product, and nothing else is taken for one."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from optimum_order.calibration import capture as capture_module
from optimum_order.calibration.capture import Capture, Watched
from optimum_order.errors import InvariantError, ModelError
from optimum_order.layers.error import squared_error
from optimum_order.layers.statistics import Gram, SquaredNorms, Statistics
from optimum_order.models.units import find_targets


def named(**modules):
    """Return the targets of some modules, by the names that they are given here."""
    return find_targets(nn.ModuleDict(modules))


@pytest.fixture
def layers():
    return [nn.Linear(4, 3, bias=bias) for bias in (True, False, True)]


@pytest.fixture
def X():
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def is_of(statistics, *inputs):
    """Return whether statistics are those of some inputs (..., in)."""
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).float()
    expected = Statistics.of(rows, {Gram})
    close = torch.allclose(statistics[Gram], expected[Gram], rtol=1e-5, atol=1e-4)
    return close and statistics.tokens == expected.tokens


class TestProducts:
    def test_of_a_linear_layer_are_seen(self, layers, X):
        with Capture(named(a=layers[0]), {Gram}) as capture:
            layers[0](X)
            layers[1](X)  # not watched
        seen = capture.statistics()
        assert list(seen) == ["a"]
        assert is_of(seen["a"], X)

    def test_of_a_conv1d_are_seen(self, X):
        layer = Conv1D(3, 4)
        with Capture(named(a=layer), {Gram}) as capture:
            layer(X)
        assert is_of(capture.statistics()["a"], X)

    @pytest.mark.parametrize(
        "product", [torch.matmul, torch.mm, torch.Tensor.matmul, lambda a, b: a @ b]
    )
    def test_in_every_way_are_seen(self, product, X):
        layer = Conv1D(6, 4)
        linear = nn.Linear(4, 6)
        for module, weight in ((layer, layer.weight), (linear, linear.weight.T)):
            with Capture(named(a=module), {Gram}) as capture:
                product(X[0], weight)
            assert is_of(capture.statistics()["a"], X[0])

    @pytest.mark.parametrize(
        "product", [torch.matmul, torch.mm, torch.Tensor.matmul, lambda a, b: a @ b]
    )
    def test_with_the_weight_on_the_left_are_seen(self, product, X):
        layer = nn.Linear(4, 6)
        with Capture(named(a=layer), {Gram}) as capture:
            product(layer.weight, X[0].T)
        assert is_of(capture.statistics()["a"], X[0])

    def test_by_name_are_seen(self, layers, X):
        layer = layers[0]
        for call in (
            lambda: functional.linear(input=X, weight=layer.weight),
            lambda: functional.linear(X, weight=layer.weight),
            lambda: functional.linear(weight=layer.weight, bias=layer.bias, input=X),
        ):
            with Capture(named(a=layer), {Gram}) as capture:
                call()
            assert is_of(capture.statistics()["a"], X)

    def test_with_a_part_of_a_weight_or_the_weight_turned_are_not(self, X):
        square = nn.Linear(4, 4)
        calls = [
            lambda w: functional.linear(X, w[:2]),
            lambda w: functional.linear(X[..., :2], w[:, :2]),
            lambda w: functional.linear(X, w.T),
            lambda w: X @ w,
            lambda w: w.T @ X[0].T,
            lambda w: w @ X[0, 0],
            lambda w: functional.linear(X, w.clone()),
            lambda w: torch.einsum("bti,oi->bto", X, w),
            lambda w: torch.bmm(X, w.T.expand(2, -1, -1)),
        ]
        for call in calls:
            with Capture(named(a=square), {Gram}) as capture:
                call(square.weight)
            assert capture.leaders == {}

    def test_with_other_tensors_are_let_pass(self, layers, X):
        watched = Watched(named(a=layers[0]))
        assert watched.reads(functional.linear, (X, layers[1].weight), {}) == []
        assert watched.reads(functional.gelu, (X,), {}) == []
        assert watched.reads(functional.linear, (X,), {}) == []


class Experts(nn.Module):
    """Three experts of one fused parameter, as transformers marks them."""

    def __init__(self, transposed):
        super().__init__()
        self.is_transposed = transposed
        shape = (3, 4, 6) if transposed else (3, 6, 4)
        self.up_proj = nn.Parameter(torch.randn(shape))

    def forward(self, x, expert):
        weight = self.up_proj[expert]
        return x @ weight if self.is_transposed else functional.linear(x, weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_of_a_fused_parameter_is_seen_alone(X, transposed):
    experts = Experts(transposed)
    with Capture(named(experts=experts), {Gram}) as capture:
        experts(X[0], torch.tensor(0))
        experts(X[1, :2], torch.tensor(2))
    seen = capture.statistics()
    assert is_of(seen["experts.up_proj.0"], X[0])
    assert is_of(seen["experts.up_proj.2"], X[1, :2])
    idle = seen["experts.up_proj.1"]
    assert idle.tokens == 0
    assert not idle[Gram].any()
    assert set(capture.leaders) == {"experts.up_proj.0", "experts.up_proj.2"}


def test_all_experts_at_once_are_not_taken_for_the_first(X):
    experts = Experts(transposed=True)
    with Capture(named(experts=experts), {Gram}) as capture:
        torch.matmul(torch.randn(3, 5, 4), experts.up_proj)
    assert capture.leaders == {}


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


class TestConvolutions:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
    @pytest.mark.parametrize("together", [2**24, 1])
    def test_are_products_with_patches(self, together, monkeypatch):
        """tr(dW H dW^T) is the squared change of all outputs, all groups together."""
        monkeypatch.setattr(capture_module, "_MOST_UNFOLDED", together)
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=generator).double()

        for options in CONVOLUTIONS:
            layer = nn.Conv2d(8, 12, **options).double()
            batches = [random(count, 8, 9, 11) for count in (3, 1)]
            targets = named(a=layer)
            capture = Capture(targets, {Gram})
            with torch.no_grad():
                for x in batches:
                    with capture:
                        layer(x)
                before = torch.cat([layer(x) for x in batches])
                deltas = {target.name: random(*target.view.shape) for target in targets}
                for target in targets:
                    target.write(target.read() + deltas[target.name])
                after = torch.cat([layer(x) for x in batches])
            seen = capture.statistics()
            assert {one.tokens for one in seen.values()} == {before[:, 0].numel()}
            predicted = sum(squared_error(deltas[name], seen[name]) for name in seen)
            change = (after - before).square().sum().item()
            assert predicted == pytest.approx(change, rel=1e-5), options

    @given(
        kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
        padding=st.one_of(st.just("valid"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
        groups=st.sampled_from([1, 2]),
        size=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    )
    @settings(max_examples=40, deadline=None)
    def test_of_any_kind_are(self, kernel, stride, dilation, padding, groups, size):
        layer = nn.Conv2d(4, 2, kernel, stride, padding, dilation, groups, bias=False).double()
        x = torch.randn(2, 4, *size).double()
        targets = named(a=layer)
        with torch.no_grad(), Capture(targets, {Gram}) as capture:
            out = layer(x)
        seen = capture.statistics()
        energy = sum(squared_error(target.read(), seen[target.name]) for target in targets)
        assert energy == pytest.approx(out.square().sum().item(), rel=1e-5)

    def test_may_be_called_by_names_and_on_one_image(self):
        layer = nn.Conv2d(4, 5, 3)
        x = torch.randn(4, 6, 6)
        with Capture(named(a=layer), {Gram}) as capture:
            functional.conv2d(x, weight=layer.weight, stride=2, padding=[1])
        assert capture.statistics()["a"].tokens == 9
        assert tuple(capture.statistics()["a"][Gram].shape) == (36, 36)

    def test_of_one_group_can_be_watched_alone(self):
        layer = nn.Conv2d(8, 8, 3, groups=4)
        target = named(a=layer)[2]
        x = torch.randn(2, 8, 5, 5)
        with Capture([target], {Gram}) as capture:
            layer(x)
        patches = functional.unfold(x[:, 4:6], 3).transpose(1, 2)
        assert list(capture.statistics()) == ["a.weight.2"]
        assert is_of(capture.statistics()["a.weight.2"], patches)

    def test_share_an_accumulation_if_they_move_over_one_image_alike(self):
        """A ResNet's first convolution and its shortcut read one tensor in different patches."""
        modules = {
            "first": nn.Conv2d(4, 6, 3, stride=2, padding=1),
            "twin": nn.Conv2d(4, 6, 3, stride=2, padding=1),
            "shortcut": nn.Conv2d(4, 6, 1, stride=2),
            "shifted": nn.Conv2d(4, 6, 3, stride=2, padding=0),
        }
        capture = Capture(named(**modules), {Gram})
        for x in (torch.randn(2, 4, 7, 7), torch.randn(1, 4, 7, 7)):
            with capture:
                for layer in modules.values():
                    layer(x)
        assert capture.leaders == {
            "first": "first",
            "twin": "first",
            "shortcut": "shortcut",
            "shifted": "shifted",
        }
        seen = capture.statistics()
        assert [len(seen[name][SquaredNorms]) for name in ("first", "shortcut")] == [36, 4]

    def test_are_cut_into_patches_a_few_images_at_a_time(self, monkeypatch):
        layer = nn.Conv2d(4, 6, 3, padding=1)
        monkeypatch.setattr(capture_module, "_MOST_UNFOLDED", 3 * 36 * 25)  # three images
        sizes = []

        def add(self, rows):
            sizes.append(len(rows))

        monkeypatch.setattr(capture_module.Accumulation, "add", add)
        with Capture(named(a=layer), {Gram}):
            layer(torch.randn(10, 4, 5, 5))
        assert sizes == [75, 75, 75, 25]

    def test_in_bfloat16_are_summed_in_float32(self):
        layer = nn.Conv2d(4, 6, 3).to(torch.bfloat16)
        x = torch.randn(2, 4, 5, 5).to(torch.bfloat16)
        with Capture(named(a=layer), {SquaredNorms}) as capture:
            layer(x)
        norms = capture.statistics()["a"][SquaredNorms]
        patches = functional.unfold(x.float(), 3)
        assert norms.dtype == torch.float32
        assert torch.allclose(norms, patches.square().sum((0, 2)), rtol=1e-5)


class TestSharing:
    def test_layers_that_read_one_tensor_share_one_accumulation(self, layers, X):
        q, k, o = layers
        capture = Capture(named(q=q, k=k, o=o), {Gram})
        other = X[:1] + 1
        for batch in (X, other):
            with capture:
                q(batch)
                k(batch)
                o(batch.clone())
        assert capture.leaders == {"q": "q", "k": "q", "o": "o"}
        seen = capture.statistics()
        assert seen["q"] is seen["k"]
        assert seen["o"] is not seen["q"]
        assert is_of(seen["q"], X, other)
        assert is_of(seen["o"], X, other)

    def test_equal_numbers_elsewhere_in_memory_are_another_input(self, layers, X):
        with Capture(named(a=layers[0], b=layers[1]), {SquaredNorms}) as capture:
            layers[0](X[0])
            layers[1](X[1])
        assert capture.leaders == {"a": "a", "b": "b"}

    def test_sharing_in_one_batch_alone_is_refused(self, layers, X):
        q, k, _ = layers
        capture = Capture(named(q=q, k=k), {Gram})
        with capture:
            q(X)
            k(X)
        message = "'k' shared its input with 'q' in one batch and not in the next"
        with pytest.raises(InvariantError, match=message), capture:
            q(X)
            k(X.clone())


class TestTraces:
    def test_norms_alone_hold_no_matrix(self, layers, X):
        with Capture(named(a=layers[0]), {SquaredNorms}) as capture:
            layers[0](X)
        seen = capture.statistics()["a"]
        assert Gram not in seen
        assert torch.allclose(seen[SquaredNorms], X.square().sum((0, 1)))

    def test_outputs_are_untouched_and_nothing_is_seen_afterwards(self, layers, X):
        layer = layers[0]
        expected = layer(X)
        with Capture(named(a=layer), {Gram}) as capture:
            assert torch.equal(layer(X), expected)
        layer(X)
        assert capture.statistics()["a"].tokens == 10

    def test_no_input_is_held_afterwards(self, layers):
        X = torch.randn(2, 4)
        held = weakref.ref(X)
        with Capture(named(a=layers[0]), {Gram}) as capture:
            layers[0](X)
            del X
        assert held() is None
        assert capture.statistics()["a"].tokens == 2

    @pytest.mark.parametrize("needs", [{Gram}, {SquaredNorms}])
    def test_inputs_that_are_not_finite_are_refused_by_name(self, layers, X, needs):
        for value in (torch.nan, torch.inf):
            X[1, 2, 3] = value
            with Capture(named(q=layers[0]), needs) as capture:
                layers[0](X)
            message = r"The inputs of 'q' are NaN or infinite on the calibration data"
            with pytest.raises(ModelError, match=message):
                capture.statistics()
