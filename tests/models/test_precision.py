"""Products are taken in the dtype that the processor multiplies fast, with float32 sums."""

import pytest
import torch

from optimum_order.errors import DataError
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


def test_the_precision_of_others_is_left_as_it_was():
    before = torch.get_float32_matmul_precision()
    with precision.products(torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ZeroDivisionError), precision.products(torch.bfloat16):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before


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
