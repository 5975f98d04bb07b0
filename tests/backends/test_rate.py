import math

import pytest
import torch

from optimum_order.backends.rate import Curve, Sketch, bisected, entropy


def gaussian(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_entropy_is_that_of_the_textbook():
    assert entropy(torch.tensor([[8, 8], [16, 0]])) == pytest.approx(16)
    assert entropy(torch.tensor([[4, 2, 1, 1]])) == pytest.approx(8 * 1.75)


@pytest.mark.parametrize("log_step", [-3.0, -2.0, -1.0])
def test_the_rate_of_gaussian_weights_is_the_textbooks(log_step):
    """At small steps an ideal coder spends log2(sigma / step) + log2(2 pi e) / 2 bits."""
    sketch = Sketch.of(gaussian(512, 1024), torch.zeros(1024))
    expected = -log_step + 0.5 * math.log2(2 * math.pi * math.e)
    assert sketch.rate(log_step, 0.5) - sketch.side == pytest.approx(expected, abs=0.03)


def test_sizes_of_rows_and_columns_are_known_to_the_coder():
    """Scales that a coder knows cost nothing: the mean rate is that of the mean log2 scale."""
    rows = gaussian(512)
    columns = gaussian(1024) / 2
    weight = gaussian(512, 1024) * torch.exp2(rows)[:, None] * torch.exp2(columns)
    sketch = Sketch.of(weight, torch.zeros(1024))
    even = Sketch.of(gaussian(512, 1024), torch.zeros(1024))
    shift = float(rows.mean() + columns.mean())
    known = sketch.rate(-3.0 + shift, 0.5)
    assert known == pytest.approx(even.rate(-3.0, 0.5), abs=0.05)
    moved = sketch.with_steps(rows, torch.zeros(1024))
    assert moved.rate(-3.0 + float(columns.mean()), 0.5) == pytest.approx(known, abs=0.05)
    both = sketch.with_steps(rows, columns)
    assert both.rate(-3.0, 0.5) == pytest.approx(known, abs=0.05)


def test_a_mask_is_paid_for():
    """Where half is pruned, a weight costs one bit and half of what the others cost."""
    weight = gaussian(512, 1024)
    pruned = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = Sketch.of(weight.masked_fill(pruned, 0.0), torch.zeros(1024), pruned)
    whole = Sketch.of(weight, torch.zeros(1024))
    expected = 1 + (whole.rate(-2.0, 0.5) - whole.side) / 2
    assert masked.rate(-2.0, 0.5) - masked.side == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("rate", [1.0, 2.5, 5.0])
def test_a_curve_finds_the_step_of_a_rate(rate):
    sketch = Sketch.of(gaussian(256, 256) * 0.02, torch.zeros(256))
    curve = Curve(sketch, 0.6)
    assert sketch.rate(curve.log_step(rate), 0.6) == pytest.approx(rate, abs=0.02)


def test_a_function_is_inverted():
    assert bisected(lambda x: -x, -0.3, 0.0, 1.0) == pytest.approx(0.3, abs=1e-6)
    assert bisected(lambda x: -x, -7.0, 0.0, 1.0) == pytest.approx(1.0, abs=1e-6)
