"""Our metrics as modules of the `evaluate` library."""

import evaluate
import pytest
import torch
from transformers import LlamaForCausalLM

from optimum_order.evaluation import Windows
from optimum_order.evaluation.interop import to_evaluate
from optimum_order.evaluation.perplexity import Perplexity


def test_it_gives_what_measure_gives(tiny_llama_folder):
    model = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    ids = torch.randint(0, 300, (5, 16), generator=torch.Generator().manual_seed(0))
    module = to_evaluate(Perplexity())
    assert isinstance(module, evaluate.Metric) and Perplexity.summary in module.description
    found = module.compute(predictions=ids.tolist(), model=model, batch_size=2, progress=False)
    expected = Perplexity().measure(model, Windows(ids, "ids in memory"), progress=False).as_dict()
    assert found["value"] == pytest.approx(expected["value"], rel=1e-5)
    assert found["digest"] == expected["digest"] and set(found) == set(expected)
