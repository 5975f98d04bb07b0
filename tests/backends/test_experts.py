"""Experts that add least are removed with their rows of the router."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from optimum_order import JointCompressor
from optimum_order.artifact.verify import verify
from optimum_order.errors import OrderError

IDS = torch.randint(2, 60, (6, 16), generator=torch.Generator().manual_seed(0))
FIELDS = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts"}


def of(model):
    return JointCompressor(model, calibration=IDS, sequence_length=16, device="cpu")


@pytest.mark.parametrize("architecture", FIELDS)
def test_what_is_left_loads_with_equal_logits(make_model, tmp_path, architecture):
    compressor = of(make_model(architecture))
    for order in ("experts:0.25 > rtn:4", "sparsegpt:0.5 > gptq:4 > experts:0.5"):
        compressed = compressor.compress(order, progress=False)
        count = 3 if "0.25" in order else 2
        facts = compressed.manifest["smaller"]
        assert facts == [
            {
                "stage": order.split(" > ")[-1 if count == 2 else 0],
                "sizes": {FIELDS[architecture]: count},
            }
        ]
        names = [name for name in compressed.layers if "experts.down_proj" in name]
        assert len(names) == 2 * count and {name[-1] for name in names} == set("012"[:count])
        for name, state in compressed.layers.items():
            state.check(name)
            assert state.grid is not None
        compressed.save_pretrained(tmp_path / order[:5], format="dense")
        assert verify(tmp_path / order[:5]) == []
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / order[:5])
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, compressed.model(IDS).logits)


def test_the_score_is_the_mean_of_weight_times_norm(make_model):
    """Of the first block, by hand."""
    model = make_model("mixtral")
    seen = []
    layer = model.model.layers[0]
    handle = layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(IDS)
        handle.remove()
        x = seen[0].flatten(0, 1)
        router, experts = layer.mlp.gate, layer.mlp.experts
        probabilities = functional.linear(x, router.weight).float().softmax(-1)
        top = probabilities.topk(2)
        weights = top.values / top.values.sum(-1, keepdim=True)
        scores = []
        for expert in range(4):
            token, place = (top.indices == expert).nonzero(as_tuple=True)
            gate, up = functional.linear(x[token], experts.gate_up_proj[expert]).chunk(2, -1)
            out = functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
            scores.append((out.norm(dim=-1) * weights[token, place]).mean())
        expected = torch.stack(scores).topk(2).indices.sort().values
    compressed = of(model).compress("experts:0.5", progress=False)
    rows = compressed.model.model.layers[0].mlp.gate.weight
    assert torch.equal(rows, router.weight[expected])
    assert torch.equal(
        compressed.model.model.layers[0].mlp.experts.down_proj, experts.down_proj[expected]
    )


def test_what_cannot_be_is_refused_in_one_line(make_model):
    for architecture, order, message in [
        ("llama", "experts:0.5", "of type 'llama' has none: width:0.2"),
        (
            "mixtral",
            "experts:0.7",
            "leave 1 of 4 experts, and a token is routed to 2: leave 2 to 3",
        ),
        ("mixtral", "experts:0.1", "leave 4 of 4 experts"),
    ]:
        with pytest.raises(OrderError, match=message) as caught:
            of(make_model(architecture)).compress(order, progress=False)
        assert "\n" not in str(caught.value)
