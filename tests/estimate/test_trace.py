"""The shapes of a model tell what a real run of it does: the same products, the same shared inputs."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from optimum_order.calibration.execution import Execution
from optimum_order.calibration.walk import walk
from optimum_order.estimate.trace import Counter, Input, forward_cost, trace
from optimum_order.layers.statistics import SquaredNorms
from optimum_order.models.units import find_units

TOKENS = {"input_ids": torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))}


def on_meta(model):
    return copy.deepcopy(model).to("meta")


def traced(model, batch):
    meta = on_meta(model)
    return trace(meta, find_units(meta), batch)


def visited(model, units, batch):
    """Return, by block, the leaders and the statistics that a walk gathers on one batch."""
    visits = walk(model, units, [batch], needs=(SquaredNorms,), execution=Execution())
    return {visit.unit.name: (visit.leaders, visit.statistics) for visit in visits}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3_text"])
def test_the_products_are_those_that_torch_counts(make_model, architecture, attention):
    model = make_model(architecture)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(**TOKENS)
    counts = counted.get_flop_counts()
    model.set_attn_implementation(attention)
    for name, cost in traced(model, TOKENS).items():
        assert cost.products == sum(counts[f"{type(model).__name__}.{name}"].values()) > 0


@pytest.mark.parametrize("architecture", ["resnet", "regnet", "vit"])
def test_the_products_of_image_classifiers_too(make_image_model, architecture):
    model = make_image_model(architecture)
    model.set_attn_implementation("eager")
    batch = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(**batch)
    counts = counted.get_flop_counts()
    for name, cost in traced(model, batch).items():
        assert cost.products == sum(counts[f"{type(model).__name__}.{name}"].values()) > 0


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "gpt_neox", "qwen3", "mixtral", "gpt_oss"]
)
def test_the_same_layers_share_an_input_as_in_a_walk(make_model, architecture):
    model = make_model(architecture)
    units = find_units(model)
    seen = visited(model, units, TOKENS)
    for name, cost in traced(model, TOKENS).items():
        leaders, statistics = seen[name]
        routed = {
            target.name for unit in units for target in unit.targets if target.kind == "expert"
        }
        assert {k: v for k, v in cost.leaders.items() if k not in routed} == {
            k: v for k, v in leaders.items() if k not in routed
        }
        plain = [n for n, leader in leaders.items() if n == leader and n not in routed]
        expected = sorted((len(statistics[n][SquaredNorms]), statistics[n].tokens) for n in plain)
        counts = sorted((read.width, read.rows) for read in cost.inputs)
        assert [pair for pair in counts if pair in expected] == expected
        assert routed.isdisjoint(leaders) or routed & set(cost.leaders)


def test_a_whole_forward_holds_its_logits_and_multiplies_for_them(make_model):
    model = make_model("llama")
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        logits = model(**TOKENS).logits
    cost = forward_cost(on_meta(model), TOKENS)
    blocks = sum(unit.products for unit in traced(model, TOKENS).values())
    assert blocks < cost.products == counted.get_total_flops()
    assert cost.working >= logits.nbytes


@pytest.mark.parametrize("architecture", ["resnet", "regnet"])
def test_a_convolution_reads_patches(make_image_model, architecture):
    model = make_image_model(architecture)
    units = find_units(model)
    batch = {"pixel_values": torch.rand(2, 3, 16, 16)}
    seen = visited(model, units, batch)
    for name, cost in traced(model, batch).items():
        leaders, statistics = seen[name]
        alone = [statistics[n] for n, leader in leaders.items() if n == leader]
        expected = sorted((len(read[SquaredNorms]), read.tokens) for read in alone)
        assert sorted((read.width, read.rows) for read in cost.inputs) == expected


def test_what_waits_is_what_a_forward_has_made(make_model):
    first, second = traced(make_model("llama"), TOKENS).values()
    hidden = 2 * 16 * 32 * 4
    assert (
        second.waiting - first.waiting == hidden
    )  # what the first block returned; the embeddings are there as well
    assert first.inputs[0] == Input(width=32, rows=32)
    assert first.working == second.working >= 3 * 2 * 16 * 48 * 4  # gate, up and their product


def test_the_model_is_left_as_it_was(make_model):
    meta = on_meta(make_model("mixtral"))
    units = find_units(meta)
    trace(meta, units, TOKENS)
    assert all("forward" not in vars(module) for module in meta.modules())


def test_memory_that_is_let_go_is_not_held():
    with Counter() as counter:
        one = torch.ones(1000)
        two = one + one
        view = two[:10]
        del one, two
        three = view * 2
    assert counter.held == 4000 + 40  # the view keeps all that it looks at
    assert counter.peak == 8000
    del three, view
    assert counter.held == 0


def test_products_in_place_are_products_and_factorisations_are_apart():
    a = torch.eye(8)
    with Counter() as counter:
        a.addmm_(a, a)
        torch.cholesky_inverse(torch.linalg.cholesky_ex(a).L)
    assert counter.products == 2 * 8**3
    assert counter.factors == pytest.approx(8**3)


def test_questions_about_numbers_are_answered_only_where_there_are_none():
    meta = torch.empty(3, device="meta", dtype=torch.bool)
    with Counter():
        assert meta.all() and not meta.any() and torch.equal(meta, meta) and int(meta.sum()) == 0
        assert not torch.tensor([True, False]).all() and torch.tensor([True, False]).any()
        assert not torch.equal(torch.ones(2), torch.zeros(2))
