"""A fold moves powers of two, and no bit of any output changes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from optimum_order.calibration.folding import find_folds
from optimum_order.models.units import find_units

SAMPLE = {"input_ids": torch.arange(12)[None]}


def llama(**options):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**(sizes | heads | options))
    return AutoModelForCausalLM.from_config(config).eval()


def readers(folds):
    return {target.name.split(".", 3)[3] for fold in folds for target in fold.readers}


@pytest.mark.parametrize("heads", [2, 4])
def test_every_layer_of_a_llama_has_a_place(heads):
    model = llama(num_key_value_heads=heads)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    folds = find_folds(model, find_units(model), SAMPLE)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert readers(folds) == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    }
    writers = {fold.writer.name.rsplit(".", 1)[1] for fold in folds if fold.writer}
    assert writers == {"v_proj", "up_proj"}  # not gate_proj: its rows pass through an activation


def test_a_fold_computes_the_same_bits():
    model = llama()
    expected = model(**SAMPLE).logits
    for number, fold in enumerate(find_folds(model, find_units(model), SAMPLE)):
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(-3, 4, (int(fold.rows.max()) + 1,), generator=generator)
        exponent = rows.to(torch.int8)[fold.rows]
        assert fold.holds(exponent)
        fold.multiply(exponent)
        for target in fold.readers:
            target.write(torch.ldexp(target.read(), -exponent.int()))
    assert torch.equal(model(**SAMPLE).logits, expected)


def test_columns_of_one_row_need_one_exponent():
    model = llama()
    fold = next(
        f for f in find_folds(model, find_units(model), SAMPLE) if len(f.rows.unique()) < 32
    )
    exponent = torch.zeros(32, dtype=torch.int8)
    assert fold.holds(exponent)
    exponent[0] = 1
    assert not fold.holds(exponent)


def test_a_gain_that_is_added_to_one_takes_no_power():
    """Gemma multiplies by 1 + gain."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    folds = find_folds(model, find_units(model), SAMPLE)
    assert "mlp.gate_proj" not in readers(folds)
    assert "mlp.down_proj" in readers(folds)
