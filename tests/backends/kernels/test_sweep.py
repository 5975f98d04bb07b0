"""The kernel against the loop in `obs`: on a GPU, or on the CPU in Triton's interpreter.

The interpreter takes an environment variable that is set before anything imports Triton:

    TRITON_INTERPRET=1 python -m pytest tests/backends/kernels
"""

import os
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

from optimum_order.backends import kernels, obs
from optimum_order.backends.kernels.sweep import fix_columns
from optimum_order.layers.grids.dual_scale import DualScaleGrid
from optimum_order.layers.grids.rounding import AffineRounder
from optimum_order.layers.grids.superblock import SuperblockGrid
from optimum_order.layers.grids.uniform import UniformGrid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_cpu = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(
    params=[pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=on_gpu)],
)
def device(request):
    return request.param


class DeadZone:
    """A dual-scale grid with a dead zone, as `ecsq` makes it."""

    def __init__(self, grid):
        self.grid = grid

    def rounder(self, columns):
        rounder = self.grid.rounder(columns)
        return AffineRounder(rounder.step, rounder.low, rounder.high, rounder.dtype, dead_zone=0.62)


def dual_scale(weight):
    scale = (weight.abs().amax(1, keepdim=True) / 6).to(weight.dtype)
    exponent = torch.arange(weight.shape[1], device=weight.device) % 3 - 1
    return DualScaleGrid(4, scale, exponent.to(torch.int8))


GRIDS = {
    "none": lambda w: None,
    "uniform": lambda w: UniformGrid.fit(w, bits=4),
    "groups": lambda w: UniformGrid.fit(w, bits=3, group_size=w.shape[1] // 4),
    "asymmetric": lambda w: UniformGrid.fit(w, bits=4, group_size=w.shape[1] // 2, symmetric=False),
    "dual scale": dual_scale,
    "dead zone": lambda w: DeadZone(dual_scale(w)),
    "symmetric K-quant": lambda w: SuperblockGrid.fit(w, "q3_k"),
    "affine K-quant": lambda w: SuperblockGrid.fit(w, "q4_k"),
}
K_QUANTS = [name for name in GRIDS if "K-quant" in name]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_kernel(monkeypatch, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(obs, "_fix_columns_on", lambda *_: fix_columns)
        return obs.sweep(*arguments, **options)


def by_loop(monkeypatch, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(obs, "_fix_columns_on", lambda *_: obs.fix_columns)
        return obs.sweep(*arguments, **options)


def lowest_half(w, d, start):
    """Remove the lower half of each span."""
    places = (w / d).square().argsort(1)[:, : w.shape[1] // 2]
    return torch.zeros_like(w, dtype=torch.bool).scatter_(1, places, True)


@pytest.fixture
def check(monkeypatch, gaussian, inputs, device):
    """Compare the kernel with the loop on a random layer.

    The two add corrections in another order, so weights differ by rounding errors of float32. Codes
    are the same, unless a weight lies that close to the middle between two codes. Then the row
    goes another way, no better and no worse: one row in a hundred may.
    """

    def compare(
        rows, columns, grid, dtype=torch.float32, *, sparsity=0.3, shuffled=False, span=None
    ):
        weight = gaussian(rows, columns, dtype=dtype).to(device)
        gram = inputs("correlated", 3 * columns, columns)[obs.Gram].to(device)
        generator = torch.Generator().manual_seed(5)
        mask = (torch.rand(rows, columns, generator=generator) < sparsity).to(device)
        order = torch.arange(columns)
        if shuffled:
            order = torch.randperm(columns, generator=generator)
        order = order.to(device)
        U, _ = obs.inverse_factor(gram, 0.01, order if shuffled else None)
        options = {
            "grid": GRIDS[grid](weight.masked_fill(mask, 0.0)),
            "choose": lambda w, d, start: mask[:, order[start : start + w.shape[1]]],
            "order": order,
        }
        if span:
            options |= {"choose": lowest_half, "span": span}
        expected, removed = by_loop(monkeypatch, weight, U, **options)
        swept, gone = by_kernel(monkeypatch, weight, U, **options)
        assert not swept[gone].any()
        assert not torch.signbit(swept[swept == 0]).any()
        error, other = (
            torch.einsum("oi,ij,oj->", delta, gram, delta)
            for delta in (swept - weight.float(), expected - weight.float())
        )
        assert float(error) == pytest.approx(float(other), rel=0.01)
        same = (gone == removed).all(1)
        if options["grid"] is None:
            same &= torch.isclose(swept, expected, rtol=1e-4, atol=1e-4).all(1)
        else:
            assert torch.equal(swept.to(dtype).float(), swept)
            same &= (swept == expected).all(1)
        assert int((~same).sum()) <= rows / 100

    return compare


@pytest.mark.parametrize("grid", [name for name in GRIDS if name not in K_QUANTS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_is_swept_as_by_the_loop(check, grid, dtype):
    check(20, 40, grid, dtype)


@pytest.mark.parametrize("grid", K_QUANTS)
def test_a_layer_on_a_k_quant_is_swept_as_by_the_loop(check, grid):
    check(8, 256, grid, torch.bfloat16)


@pytest.mark.parametrize("shape", [(1, 4), (5, 128), (33, 12), (16, 140)])
@pytest.mark.parametrize("grid", ["none", "uniform"])
def test_a_layer_of_any_shape_is_swept_as_by_the_loop(check, shape, grid):
    check(*shape, grid)


@pytest.mark.parametrize("grid", ["none", "groups", "dead zone"])
def test_columns_in_another_order_are_swept_as_by_the_loop(check, grid):
    check(8, 140, grid, torch.bfloat16, shuffled=True)


@pytest.mark.parametrize("grid", ["none", "asymmetric"])
@pytest.mark.parametrize("span", [2, 3, 4, 32])
def test_spans_are_swept_as_by_the_loop(check, grid, span):
    check(9, 48, grid, span=span)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("grid", ["none", "uniform"])
def test_masks_of_nothing_and_of_everything_are_swept_as_by_the_loop(check, sparsity, grid):
    check(4, 20, grid, sparsity=sparsity)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_column_is_rounded_to_the_same_bits(gaussian, device, grid, dtype):
    """Without corrections there is no tolerance: middles between codes and extremes included."""
    rows = 400
    weight = gaussian(rows, 256, dtype=dtype)
    rounding = GRIDS[grid](weight)
    rounder = None if rounding is None else rounding.rounder(torch.arange(1))
    values = 2 * gaussian(rows, 1)
    extremes = [0.0, -0.0, 1e-30, 3e4, -3e4, 1e20, -1e20, torch.inf, -torch.inf, torch.nan]
    if grid == "none":
        extremes = extremes[:7]  # of infinity less infinity, only one gives NaN for a survivor
    values[: len(extremes), 0] = torch.tensor(extremes)
    if grid != "none":  # the NaN that a GPU makes
        values[len(extremes), 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    if rounder is not None:
        middles = torch.arange(-40, 40) / 2
        step = rounder.step[0, 20:100]
        offset = 0.0 if rounder.offset is None else rounder.offset[0, 20:100]
        values[20:100, 0] = middles * step - offset
    removed = torch.zeros(1, rows, dtype=torch.bool)
    removed[0, 200:250] = True
    follow = torch.ones(1, 1)
    expected, errors = values.T.clone(), torch.empty(1, rows)
    obs.fix_columns(expected, errors, removed, follow, rounder, 0, 1)
    if rounder is not None:
        fields = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in vars(rounder).items()
            if not name.startswith("_")
        }
        rounder = AffineRounder(**fields)
    block = values.T.clone().to(device)
    lost = torch.empty_like(block)
    fix_columns(block, lost, removed.to(device), follow.to(device), rounder, 0, 1)
    for mine, its in ((block.cpu(), expected), (lost.cpu(), errors)):
        assert torch.equal(mine.isnan(), its.isnan())
        assert torch.equal(mine.nan_to_num(), its.nan_to_num())
    fixed = block.cpu().nan_to_num()
    assert not torch.signbit(fixed[fixed == 0]).any()


class TestOnAGPU:
    pytestmark = on_gpu

    @pytest.fixture
    def device(self):
        return "cuda"

    @pytest.mark.parametrize("grid", GRIDS)
    def test_a_large_layer_is_swept_as_by_the_loop(self, check, grid):
        check(1003, 1024, grid, torch.bfloat16)

    def test_a_sweep_takes_the_kernel(self, gaussian):
        rounder = UniformGrid.fit(gaussian(), bits=4).rounder(torch.arange(4))
        cuda = torch.device("cuda")
        assert kernels.available(cuda)
        for rounding in (None, rounder):
            assert obs._fix_columns_on(cuda, rounding) is fix_columns
