"""What experts add is gathered for each router, as the definition has it."""

import pytest
import torch

from optimum_order.calibration.ranks import Ranks
from optimum_order.calibration.routed import expert_norms
from optimum_order.layers.statistics import ExpertNorms
from optimum_order.models import hf
from optimum_order.models.architecture import require_roles


@pytest.fixture
def mixture(make_model):
    model = make_model("qwen3_moe")
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    return model, ids


def by_hand(model, ids, block):
    """Mean norm of gate times output of each expert of a block, over its tokens."""
    mlp = model.model.layers[block].mlp
    seen = []
    handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    chances = (rows @ mlp.gate.weight.T).float().softmax(-1)
    gates, chosen = chances.topk(model.config.num_experts_per_tok, -1)
    if model.config.norm_topk_prob:
        gates = gates / gates.sum(-1, keepdim=True)
    norms = [[] for _ in range(model.config.num_experts)]
    for row, mine, experts in zip(rows, gates, chosen, strict=True):
        for gate, expert in zip(mine, experts.tolist(), strict=True):
            up, down = mlp.experts.gate_up_proj[expert], mlp.experts.down_proj[expert]
            first, second = (up @ row).chunk(2)
            out = down @ (torch.nn.functional.silu(first) * second)
            norms[expert].append((gate * out).norm().item())
    return torch.tensor([sum(values) / max(1, len(values)) for values in norms])


def test_norms_are_those_of_what_each_expert_adds_to_its_tokens(mixture):
    model, ids = mixture
    blocks = require_roles(model).blocks
    with (
        torch.no_grad(),
        hf.eager_experts(model),
        expert_norms(model, blocks, Ranks()) as gathered,
    ):
        for part in ids.split(2):
            model(input_ids=part)
        statistics = [gathered(block.mixture.router.name) for block in blocks]
    for number, seen in enumerate(statistics):
        assert seen.tokens == ids.numel()
        assert torch.allclose(seen[ExpertNorms], by_hand(model, ids, number), rtol=1e-3, atol=1e-7)
        assert seen[ExpertNorms].any()


def test_nothing_is_gathered_afterwards_or_where_samples_are_not_to_be_counted(mixture):
    model, ids = mixture
    blocks = require_roles(model).blocks
    router = blocks[0].mixture.router.name
    with (
        torch.no_grad(),
        hf.eager_experts(model),
        expert_norms(model, blocks, Ranks(), counts=False) as gathered,
    ):
        model(input_ids=ids)
        idle = gathered(router)
    assert idle.tokens == 0 and not idle[ExpertNorms].any()
    modules = [module for module in model.modules() if module._forward_pre_hooks]
    assert not modules, "the hooks are gone"


def test_blocks_without_a_mixture_are_passed_over(make_model):
    model = make_model("llama")
    with expert_norms(model, require_roles(model).blocks, Ranks()) as gathered:
        with pytest.raises(KeyError):
            gathered("model.layers.0.mlp.gate")
