"""Products are taken in the dtype that the processor multiplies fast, with float32 sums."""

import pytest
import torch

from optimum_order.calibration.accumulate import Accumulation
from optimum_order.errors import DataError
from optimum_order.layers.statistics.gram import Gram
from optimum_order.models import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "units", "expected"),
    [
        ("auto", torch.float32, True, torch.bfloat16),
        ("auto", torch.float32, False, torch.float32),
        ("auto", torch.bfloat16, False, torch.bfloat16),
        ("auto", torch.float16, True, torch.float32),  # bfloat16 would lose three of its digits
        ("float32", torch.float32, True, torch.float32),
        ("bfloat16", torch.float32, False, torch.bfloat16),
    ],
)
def test_bfloat16_where_it_costs_nothing_or_the_processor_is_made_for_it(
    monkeypatch, name, dtype, units, expected
):
    monkeypatch.setattr(precision, "has_units", lambda device: units)
    assert precision.choose(name, dtype, CPU) == expected


def test_another_choice_is_refused():
    with pytest.raises(DataError, match=r"'float16'\. .*auto, bfloat16, float32"):
        precision.choose("float16", torch.float32, CPU)


def processor(monkeypatch, *, units, matrices=False):
    """Have a processor with units for bfloat16, of vectors or of matrices."""
    monkeypatch.setattr(precision, "has_units", lambda device: units)
    monkeypatch.setattr(precision, "_has_matrix_units", lambda: matrices)


def test_the_precision_of_others_is_left_as_it_was(monkeypatch):
    processor(monkeypatch, units=True, matrices=True)
    before = torch.get_float32_matmul_precision()
    with precision.products(torch.bfloat16, CPU):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), precision.products(torch.bfloat16, CPU):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


def rows_with_an_outlier():
    """Return inputs of a layer with one channel a hundred times as large as the others."""
    rows = torch.randn(4096, 96, generator=torch.Generator().manual_seed(0))
    rows = rows @ torch.randn(96, 96, generator=torch.Generator().manual_seed(1)) / 10
    rows[:, 5] *= 100
    return rows


def gram_of(rows):
    sums = Accumulation(rows.shape[1], {Gram}, CPU, torch.bfloat16)
    with torch.inference_mode():
        for batch in rows.split(512):
            sums.add(batch)
    return sums.result()[Gram].double()


@pytest.mark.parametrize("units", [False, True])
def test_sums_are_as_exact_as_the_manifest_says(monkeypatch, units):
    """Float32 sums are exact to 1e-6. Those of bfloat16 are not, and stay within a damping of 1 %."""
    processor(monkeypatch, units=units)
    rows = rows_with_an_outlier()
    exact = rows.double().T @ rows.double()
    error = gram_of(rows) - exact
    relative = (error / torch.outer(exact.diagonal(), exact.diagonal()).sqrt()).abs().max()
    if precision.describe(torch.bfloat16, CPU)["sums"] == "float32":
        assert relative < 1e-6
    else:
        assert 1e-5 < relative < 2e-3
    small = [index for index in range(96) if index != 5]
    shift = torch.linalg.eigvalsh(error[small][:, small]).abs().max()
    assert shift < 0.01 * exact.diagonal()[small].mean()


def test_products_in_bfloat16_are_float32_and_sums_lose_nothing(monkeypatch):
    """What the sums were before is not rounded; a bfloat16 product would lose small addends."""
    processor(monkeypatch, units=True)
    x, y = torch.randn(32, 64), torch.randn(64, 16)
    rounded = (x.bfloat16().double() @ y.bfloat16().double()).float()
    sums = torch.full((32, 16), 1e4)
    with precision.products(torch.bfloat16, CPU):
        product = x @ y
        sums.addmm_(x, y)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product, rounded, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(sums - 1e4, product, rtol=0, atol=2e-3)


def test_what_is_not_a_product_of_float32_matrices_stays_as_it_is(monkeypatch):
    processor(monkeypatch, units=True)
    x = torch.randn(8, 8).double()
    with precision.products(torch.bfloat16, CPU):
        assert torch.equal(x @ x, x.clone() @ x)
        sums = torch.ones(8, 8).addmm_(x.float(), x.float(), beta=0)
    assert torch.equal(sums, torch.ones(8, 8).addmm_(x.float(), x.float(), beta=0))


@pytest.mark.parametrize(
    ("dtype", "device", "units", "expected"),
    [
        (torch.bfloat16, "cpu", True, "bfloat16"),
        (torch.bfloat16, "cpu", False, "float32"),  # no gain, so no loss
        (torch.float32, "cpu", True, "float32"),
        (torch.bfloat16, "cuda", True, "tfloat32"),
    ],
)
def test_a_manifest_says_what_sums_were_multiplied_in(monkeypatch, dtype, device, units, expected):
    processor(monkeypatch, units=units)
    described = precision.describe(dtype, torch.device(device))
    assert described == {"dtype": str(dtype).removeprefix("torch."), "sums": expected}


@pytest.mark.parametrize("grad", [False, True])
def test_a_bfloat16_model_multiplies_in_float32_where_there_are_no_units(monkeypatch, grad):
    """Products and attention differ from torch's own by no more than a rounding of the result."""
    monkeypatch.setattr(precision, "has_units", lambda device: False)
    torch.manual_seed(0)
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    q = torch.randn(1, 2, 8, 16).bfloat16()
    exact = x.double() @ w.double().T
    with torch.set_grad_enabled(grad), precision.forwards(torch.bfloat16, torch.bfloat16, CPU):
        y = torch.nn.functional.linear(x, w.clone().requires_grad_(grad))
        attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert y.dtype == attended.dtype == torch.bfloat16
    assert torch.equal(y, exact.to(torch.bfloat16))
    plain = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(attended, plain, rtol=0.02, atol=0.02)
    with precision.forwards(torch.bfloat16, torch.bfloat16, CPU), torch.inference_mode():
        assert torch.equal(torch.nn.functional.linear(x, w), exact.to(torch.bfloat16))
