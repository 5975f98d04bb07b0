"""Sparsity is divided so that all layers together have what was asked for, by what layers need."""

import itertools

import pytest
import torch

from optimum_order import JointCompressor
from optimum_order.backends.allocation import ALLOCATIONS
from optimum_order.engine.passes import Passes
from optimum_order.engine.recipe import method
from optimum_order.errors import OrderError, OutputError
from optimum_order.layers.state import LayerState
from optimum_order.layers.statistics import Gram, Statistics
from optimum_order.order import Order, Stage
from optimum_order.testing import same

METHODS = ("wanda", "sparsegpt", "alps")
NAMES = [f"model.layers.{block}.{part}" for block in range(3) for part in ("q_proj", "up_proj")]
IDS = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))


def make(name, allocation, **options):
    return method(Stage(name, sparsity=0.6, allocation=allocation, **options))


def profiled(backend, weights, sensitivities=None):
    """Return the profiles of layers that read white noise."""
    statistics = Statistics(8, {Gram: torch.eye(32) * 8})
    return {
        name: backend.profile(
            LayerState(weight), statistics, sensitivity=(sensitivities or {}).get(name)
        )
        for name, weight in weights.items()
    }


def average(sparsities, weights):
    sizes = {name: weight.numel() for name, weight in weights.items()}
    return sum(sparsities[n] * sizes[n] for n in sizes) / sum(sizes.values())


@pytest.fixture
def weights(gaussian):
    """Layers of several sizes; those of block 1 have a few large weights."""
    drawn = {n: gaussian(16 * (1 + i % 2), 32, i) for i, n in enumerate(NAMES)}
    for name in NAMES[2:4]:
        drawn[name][::4, ::8] *= 10
    return drawn


def test_a_block_with_outliers_is_spared(weights):
    for name in METHODS:
        backend = make(name, "owl")
        sparsities = backend.divided(profiled(backend, weights))
        assert average(sparsities, weights) == pytest.approx(0.6, abs=1e-4)
        blocks = [sparsities[n] for n in NAMES[::2]]
        assert blocks == [sparsities[n] for n in NAMES[1::2]], "one sparsity for a block"
        assert blocks[1] == min(blocks) and max(blocks) - blocks[1] > 0.1
        assert all(0.52 - 1e-6 <= value <= 0.68 + 1e-6 for value in blocks)


def test_outliers_are_counted_as_the_paper_says(gaussian):
    """A weight is one if its score is above so many times the mean of its block."""
    weights = {name: torch.ones(16, 32) for name in NAMES}
    weights[NAMES[0]][0, 0] = 20.0  # 1 of 1024 weights
    weights[NAMES[2]][0, :2] = 20.0  # 2 of 1024
    backend = make("wanda", "owl")
    sparsities = backend.divided(profiled(backend, weights))
    first, second, third = (sparsities[name] for name in NAMES[::2])
    assert third - first == pytest.approx(first - second, abs=1e-6)
    assert third - second == pytest.approx(0.16, abs=1e-6)
    deaf = make("wanda", "owl", outliers=30.0)
    alike = deaf.divided(profiled(deaf, weights))
    assert max(alike.values()) == pytest.approx(min(alike.values())) == pytest.approx(0.6)


def test_one_threshold_for_all_scores(weights):
    """Within the spread the weights that stay are those that cost most."""
    for name in METHODS:
        backend = make(name, "global", spread=0.5)
        ones = {n: torch.ones(2, len(weight)) for n, weight in weights.items()}
        sparsities = backend.divided(profiled(backend, weights, ones))
        assert average(sparsities, weights) == pytest.approx(0.6, abs=1e-4)
        everything = torch.cat([weight.flatten().abs() for weight in weights.values()])
        threshold = everything.quantile(0.6)
        for layer, weight in weights.items():
            expected = (weight.abs() <= threshold).float().mean().item()
            assert sparsities[layer] == pytest.approx(expected, abs=0.02), (name, layer)


def test_what_matters_more_to_the_loss_is_spared(weights):
    backend = make("sparsegpt", "global")
    loud = {n: torch.ones(2, len(w)) * (9.0 if n == NAMES[4] else 1.0) for n, w in weights.items()}
    del loud[NAMES[5]]  # such as an expert, whose gradients nobody takes
    sparsities = backend.divided(profiled(backend, weights, loud))
    assert sparsities[NAMES[4]] == pytest.approx(0.52)
    assert sparsities[NAMES[5]] == pytest.approx(0.6)
    assert average(sparsities, weights) == pytest.approx(0.6, abs=1e-4)


def test_weights_that_are_gone_are_the_first_to_go(weights):
    """A layer that was pruned before has its zeros below every threshold."""
    backend = make("wanda", "global", spread=0.3)
    ones = {n: torch.ones(2, len(weight)) for n, weight in weights.items()}
    profiles = profiled(backend, weights, ones)
    pruned = method(Stage("magnitude", 0.8)).apply(LayerState(weights[NAMES[0]]))
    profiles[NAMES[0]] = backend.profile(
        pruned, Statistics(8, {Gram: torch.eye(32) * 8}), sensitivity=ones[NAMES[0]]
    )
    assert backend.divided(profiles)[NAMES[0]] > 0.75


@pytest.fixture
def compressor(tiny_llama_folder):
    return lambda: JointCompressor.from_pretrained(
        str(tiny_llama_folder), calibration=IDS, sequence_length=16
    )


def test_a_run_has_the_sparsity_and_says_what_each_layer_got(compressor):
    for name, allocation in itertools.product(("wanda", "alps"), ALLOCATIONS[1:]):
        options = ", rounds=3, steps=1" if name == "alps" else ""
        stage = f"{name}(sparsity=0.6, allocation={allocation}{options})"
        compressed = compressor().compress(f"{stage} > rtn:4", schedule="block", progress=False)
        assert compressed.sparsity == pytest.approx(0.6, abs=1 / 64)  # whole weights of a row
        shares = {layer: state.sparsity for layer, state in compressed.layers.items()}
        assert max(shares.values()) - min(shares.values()) > 0.05
        assert all(0.5 <= share <= 0.7 for share in shares.values())
        assert str(compressed.order) == str(Order([method(Stage.parse(stage)).stage, "rtn:4"]))
        for layer, records in compressed._records.items():
            (first, second) = records
            own = method(Stage.parse(first.stage)).options
            assert own.allocation == "uniform" and second.stage == "rtn:4"
            assert own.sparsity == pytest.approx(shares[layer], abs=1 / 64)


def test_a_killed_run_goes_on_bit_for_bit(compressor, tmp_path, monkeypatch):
    order = "wanda(sparsity=0.6, allocation=global)"
    whole = compressor().compress(order, progress=False)
    saves = []
    original = Passes._keep

    def keep(self, *args, **options):
        if len(saves) == 3:  # two profiles, and the first block
            raise KeyboardInterrupt
        saves.append(args)
        original(self, *args, **options)

    monkeypatch.setattr(Passes, "_keep", keep)
    with pytest.raises(KeyboardInterrupt):
        compressor().compress(order, work_dir=tmp_path / "work", progress=False)
    monkeypatch.setattr(Passes, "_keep", original)
    again = compressor().compress(order, work_dir=tmp_path / "work", resume=True, progress=False)
    assert len(saves) == 3
    for name, state in whole.layers.items():
        assert same(state, again.layers[name]), name


def test_what_cannot_be_divided_is_refused_before_the_work(compressor, tmp_path):
    for text, message in {
        "wanda(pattern=2:4, allocation=owl)": "pattern 2:4 gives all layers one sparsity",
        "wanda(sparsity=0.5, allocation=best)": "uniform, owl or global, got 'best'",
        "alps(sparsity=0.5, spread=0.0)": "between 0 and 1",
        "alps(sparsity=0.5, outliers=1.0)": "above 1",
    }.items():
        with pytest.raises(OrderError, match=message):
            method(Stage.parse(text))
    with pytest.raises(OutputError, match="looks at all layers before it treats the first"):
        compressor().compress(
            "wanda(sparsity=0.5, allocation=owl)",
            work_dir=tmp_path / "work",
            low_memory=True,
            progress=False,
        )
    assert not (tmp_path / "work").exists()
